"""Run every built-in patch's probe and the exactness tests on a release of torch, and write its row.

    python tools/torch_sweep.py 2.12.1 2.14.1                       # rows of docs/compatibility.md
    python tools/torch_sweep.py --python .venv/bin/python           # of an existing environment

Each release is installed below `build/upstream` in a virtual environment of its own, together with this project, and
stays there: 5 GB for one that is built for CUDA. There is no time limit on the tests. The exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from patches.builtin import BUILTIN
from upstream.releases import InstallError, environment
from upstream.suites import read_outcomes
from upstream.torch_rows import row, rows_of, with_rows
from upstream.verdicts import check

#: Tests that depend on torch's internals: of the patches, and of models compared bit for bit over real ranks.
TESTS: Final = (
    "tests/patches/builtin",
    "tests/distributed/test_exactness.py",
    "tests/distributed/test_fsdp2_gather.py",
)

_OTHERS: Final = ("transformers", "peft", "bitsandbytes")
_FOLDER: Final = Path("build/upstream")
_PAGE: Final = Path("docs/compatibility.md")
_VERSIONS: Final = (
    "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
)


def main() -> int:
    """Run the sweep; returns the exit code."""
    options = _parse()
    failed = False
    for python in [*map(Path, options.python), *(_environment(version) for version in options.versions)]:
        version, line, passed = _ask(python, options.tests or TESTS)
        print(line, flush=True)
        text = _PAGE.read_text()  # read again: another run may have written its row meanwhile
        _PAGE.write_text(with_rows(text, {**rows_of(text), version: line}))
        failed |= not passed
    return int(failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="releases of torch to install")
    parser.add_argument("--python", action="append", default=[], help="an interpreter with a torch; repeatable")
    parser.add_argument("--tests", action="append", help="what to give pytest, if not all; repeatable")
    return parser.parse_args()


def _environment(version: str) -> Path:
    """The interpreter of an environment with this version of torch, which is made unless it exists."""
    place = _FOLDER / f"torch-{version}"
    python = place / "bin" / "python"
    if (place / "ready").exists():
        return python
    venv.create(place, with_pip=True, clear=True)
    constraint = place / "constraint.txt"
    constraint.write_text(f"torch=={version}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for what in ([f"torch=={version}"], ["--constraint", str(constraint), "--editable", ".[dev]"]):
        ran = subprocess.run([*pip, *what], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise InstallError(f"torch {version} could not be installed: {ran.stderr.strip()[-500:]}")
    (place / "ready").touch()
    return python


def _ask(python: Path, tests: Sequence[str]) -> tuple[str, str, bool]:
    """Run probes and tests with `python`; returns its version of torch, its row, and whether every test passed."""
    names = ("torch", *_OTHERS)
    asked = subprocess.run([python, "-c", _VERSIONS, *names], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(asked.stdout)
    version = versions.pop("torch").partition("+")[0]
    verdicts = check([], [Path()], list(BUILTIN), python=str(python))
    report = _FOLDER / f"torch-{version}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "--junit-xml", str(report)]
    subprocess.run(command, env=environment([Path()]), check=False)
    outcomes = read_outcomes(report)
    passed = bool(outcomes) and set(outcomes.values()) <= {"passed", "skipped"}
    return version, row(version, versions, verdicts, outcomes), passed


if __name__ == "__main__":
    sys.exit(main())
