"""Verdicts of `patches check` under one combination of releases, in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .releases import Release, environment

__all__ = ["Outcome", "check"]

_TIMEOUT: Final = 600

_MARK: Final = "cannot be imported: "
# The library's own exception, rather than the one that a probe makes of it.
_IMPORT: Final = f"""
import importlib, sys
try:
    importlib.import_module(sys.argv[1])
except Exception as error:
    print("{_MARK}" + type(error).__name__ + ": " + (str(error).splitlines() or [""])[0])
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The verdicts under one combination, or the reason why there are none."""

    releases: tuple[Release, ...]
    verdicts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """id -> {"verdict", "why"}."""
    not_importable: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> the exception that importing it raises."""
    failure: str = ""
    """Reason why `patches check` gave no verdicts at all: our fault, whatever the releases."""

    def __str__(self) -> str:
        return ", ".join(map(str, self.releases))

    @property
    def names(self) -> frozenset[str]:
        """The distributions that the combination names."""
        return frozenset(release.name for release in self.releases)

    def version(self, name: str) -> str:
        """The version of a distribution in this combination."""
        return next(release.version for release in self.releases if release.name == name)


def check(
    releases: Sequence[Release], folders: Iterable[Path], ids: Sequence[str], *, python: str = sys.executable
) -> Outcome:
    """Run `patches check --json` for these ids, with `folders` taking precedence over the environment of `python`."""
    variables = environment(folders)
    broken = {release.name: _import_error(release.name, variables, python) for release in releases}
    broken = {name: error for name, error in broken.items() if error}
    ran = _run(["-m", "patches", "check", *ids, "--json"], variables, python)
    if ran.returncode not in (0, 1):  # 1: some verdict cannot be trusted, which is a valid result here
        failure = f"exit code {ran.returncode}: {ran.stderr.strip()[-2000:]}"
        return Outcome(releases=tuple(releases), not_importable=broken, failure=failure)
    return Outcome(releases=tuple(releases), not_importable=broken, verdicts=_by_id(ran.stdout))


def _import_error(name: str, variables: Mapping[str, str], python: str) -> str:
    ran = _run(["-c", _IMPORT, name], variables, python)
    if ran.returncode:
        return f"the interpreter exits with {ran.returncode}"
    # Old bitsandbytes prints to standard output if it finds no GPU.
    found = [line for line in ran.stdout.splitlines() if line.startswith(_MARK)]
    return found[0].removeprefix(_MARK) if found else ""


def _by_id(text: str) -> dict[str, dict[str, str]]:
    # Skip such output: the list begins on a line of its own.
    rows: list[dict[str, Any]] = json.loads(text[text.index("[\n") :])
    return {row["id"]: {"verdict": row["verdict"], "why": row["why"]} for row in rows}


def _run(arguments: Sequence[str], variables: Mapping[str, str], python: str) -> subprocess.CompletedProcess[str]:
    command = [python, *arguments]
    return subprocess.run(command, env=dict(variables), capture_output=True, text=True, timeout=_TIMEOUT, check=False)
