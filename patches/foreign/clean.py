"""The clean process: the contents of the same modules, unpatched.

It imports the modules that are loaded here, from the same `sys.path`, package by package, and describes each package
before it imports the next: so changes that one library makes to another on import count as patches. `site` is not
run there, since a `sitecustomize` or a `.pth` file may patch too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ForeignError
from .describe import DATA, describe
from .walk import bindings, loaded, namespace

__all__ = ["Baseline", "CleanProcess", "answer"]

_PROGRAM: Final = f"""
import json, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"]
sys.prefix, sys.exec_prefix = request["prefixes"]
from {__name__} import answer
answer(request)
"""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The contents of a package in the clean process."""

    owners: frozenset[str]
    """Modules and classes that exist there; others cannot be compared."""
    descriptions: Mapping[str, Sequence[str]]
    """Path -> description of the object there; several descriptions if several classes share a name."""
    failed: Mapping[str, str]
    """Module that could not be imported there -> reason."""


class CleanProcess:
    """A clean process, started by the constructor so that it imports while this process does something else."""

    def __init__(self, packages: Sequence[str], *, timeout: float) -> None:
        import subprocess

        self._timeout = timeout
        self._request = {
            "path": [*sys.path, *_folders(packages)],
            "prefixes": [sys.prefix, sys.exec_prefix],
            "packages": {package: loaded(package) for package in packages},
        }
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and our own program
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def baselines(self) -> dict[str, Baseline]:
        """Wait for the process, and return its baselines by package. Raises ForeignError if it does not answer."""
        import subprocess

        try:
            out, err = self._process.communicate(json.dumps(self._request).encode(), timeout=self._timeout)
        except subprocess.TimeoutExpired as error:
            self.stop()
            why = f"it was still importing after {self._timeout:g} s; pass a longer timeout"
            raise ForeignError(f"no clean process to compare with: {why}", why=why) from error
        if self._process.returncode != 0:
            why = f"it ended with {self._process.returncode}: {err.decode(errors='replace').strip()[-2000:]}"
            raise ForeignError(f"no clean process to compare with: {why}", why=why)
        return {package: _baseline(seen) for package, seen in json.loads(out).items()}

    def stop(self) -> None:
        """End the process, if it is still running, and close its pipes."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def answer(request: Mapping[str, Any]) -> None:
    """Run in the clean process: import, describe, and write the answer to the original standard output."""
    # Libraries print while they are imported; that output must not mix with the answer.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        seen = {package: _observe(package, modules) for package, modules in request["packages"].items()}
        json.dump(seen, out)
    # Exit without waiting for threads and exit handlers of the libraries, which may take seconds.
    sys.stderr.flush()
    os._exit(0)


def _observe(package: str, modules: Iterable[str]) -> dict[str, Any]:
    failed = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:  # noqa: BLE001 - even SystemExit: other modules follow
            failed[module] = f"{type(error).__name__}: {error}"[:200]
    owners = set(loaded(package))
    descriptions: dict[str, list[str]] = {}
    for binding in bindings(package):
        description = describe(binding.value)
        owners.add(binding.owner)
        known = descriptions.setdefault(binding.path, [])
        if description not in known:
            known.append(description)
    # Registries without code would only make the answer longer.
    descriptions = {path: found for path, found in descriptions.items() if found != [DATA] or "[" not in path}
    return {"owners": sorted(owners), "descriptions": descriptions, "failed": failed}


def _baseline(seen: Mapping[str, Any]) -> Baseline:
    return Baseline(owners=frozenset(seen["owners"]), descriptions=seen["descriptions"], failed=seen["failed"])


def _folders(packages: Sequence[str]) -> list[str]:
    """The folders of the packages and of this one, which an editable installation's import hook may have found."""
    folders = []
    for package in (*packages, __name__.partition(".")[0]):
        file = namespace(sys.modules.get(package)).get("__file__")
        if isinstance(file, str):
            root = os.path.dirname(file) if os.path.basename(file).startswith("__init__.") else file  # noqa: PTH119, PTH120
            folders.append(os.path.dirname(root))  # noqa: PTH120 - strings, as in sys.path
    return folders
