"""Run of a library's own tests in a separate process, with the outcome of each."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .releases import environment

__all__ = ["Suite", "SuiteError", "differences", "extract", "read_outcomes", "run"]

_NOT_RESTORED: Final = "not restored at the end of the run: "  # the plugin's message


class SuiteError(Exception):
    """The tests could not be extracted, pytest did not run all of them, or a patch was not undone."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The result of one run."""

    outcomes: Mapping[str, str]
    """Test -> passed, failed, error or skipped."""
    header: tuple[str, ...]
    """Lines about patches in the header of the run."""

    def __str__(self) -> str:
        found = list(self.outcomes.values())
        counts = ", ".join(f"{found.count(word)} {word}" for word in sorted(set(found)))
        return f"{len(found)} tests: {counts or 'none ran'}"


def extract(source: Path, ref: str, folder: Path, *, undecorated: Sequence[str] = ()) -> Path:
    """Extract `tests/` of a git repository (with or without a work tree) at `ref`; returns its folder below `folder`.

    Only the tests: otherwise the unbuilt source of the library would be imported in place of the installed one.
    undecorated: decorators to leave out, such as one that skips tests on a CPU.
    """
    place = folder / f"{source.resolve().name}-tests-{ref.replace('/', '-')}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    git = ["git", "-C", str(source), "archive", ref, "tests"]
    ran = subprocess.run(git, capture_output=True, check=False)
    if ran.returncode:
        raise SuiteError(f"{source} has no tests as of {ref}: {ran.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(ran.stdout)) as archive:
        archive.extractall(place, filter="data")
    lines = {f"@{name}" for name in undecorated}
    for file in place.rglob("*.py") if lines else ():
        kept = [line for line in file.read_text().splitlines(keepends=True) if line.strip() not in lines]
        file.write_text("".join(kept))
    # Makes this folder the root, and replaces the library's options, which may need plugins or a coverage tool.
    (place / "pytest.ini").write_text("[pytest]\n")
    return place


def run(place: Path, arguments: Sequence[str], *, ids: Sequence[str], beside: Iterable[Path]) -> Suite:
    """Run pytest in `place`, under these patches if any; modules in the folders `beside` can be imported too.

    Raises SuiteError if pytest could not collect all tests, or a patch could not be undone at the end.
    """
    report = place.resolve() / f"{'patched' if ids else 'stock'}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--verbosity=0", "-p", "no:cacheprovider", *arguments]
    command += ["--junit-xml", str(report), "--patches", ",".join(ids)]
    ran = subprocess.run(command, cwd=place, env=environment(beside), capture_output=True, text=True, check=False)
    if ran.returncode not in (0, 1):  # other than test failures: nothing collected, or not everything
        raise SuiteError(f"pytest exited with {ran.returncode}: {(ran.stdout + ran.stderr)[-1500:]}")
    left = [line for line in ran.stdout.splitlines() if line.startswith(_NOT_RESTORED)]
    if left:
        raise SuiteError("; ".join(left))
    header = tuple(line for line in ran.stdout.splitlines() if line.startswith("patches: "))
    return Suite(outcomes=read_outcomes(report), header=header)


def differences(stock: Suite, patched: Suite) -> list[tuple[str, str, str]]:
    """Find `(test, outcome without patches, outcome with them)` for each test whose outcomes differ."""
    tests = sorted(stock.outcomes.keys() | patched.outcomes.keys())
    pairs = [(test, stock.outcomes.get(test, "absent"), patched.outcomes.get(test, "absent")) for test in tests]
    return [pair for pair in pairs if pair[1] != pair[2]]


def read_outcomes(report: Path) -> dict[str, str]:
    """Test -> passed, failed, error or skipped, from a report of `pytest --junit-xml`."""
    # Python's expat refuses entity bombs since 2.4.1, and the file was just written by pytest.
    root = ET.parse(report).getroot()  # noqa: S314
    found: dict[str, str] = {}
    for case in root.iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        words = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        # A test that fails and then also fails in teardown is listed twice.
        found[test] = "+".join(filter(None, (found.get(test), _word(words)))) if test in found else _word(words)
    return found


def _word(tags: Sequence[str]) -> str:
    return {"failure": "failed"}.get(tags[0], tags[0]) if tags else "passed"
