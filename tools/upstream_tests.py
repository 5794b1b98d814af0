"""Run a library's own tests twice, without patches and with every built-in patch active, and compare the outcomes.

    git clone https://github.com/huggingface/peft build/peft
    python tools/upstream_tests.py build/peft v0.20.0 -- tests/test_custom_models.py -k "Vanilla and LoRA"

Arguments after `--` go to pytest. Only `tests/` of the repository is used, at the given tag or commit, on the
installed release. Dependencies of these tests that this project lacks can be put into separate folders (`--beside`).

If a test ends differently, all are run once more without patches. A test that differs between those two runs is
unstable, and says nothing about patches; the exit code is 1 if any other differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from patches.builtin import BUILTIN
from upstream.suites import Suite, differences, extract, run

_FOLDER: Final = Path("build/upstream")


def main() -> int:
    """Run the tests, compare, and print; returns the exit code."""
    options = _parse()
    place = extract(options.source, options.ref, _FOLDER, undecorated=options.undecorated)
    stock = _timed("stock", place, options, ids=())
    patched = _timed("patched", place, options, ids=options.ids)
    print("\n".join(patched.header))
    found = differences(stock, patched)
    again = _timed("stock again", place, options, ids=()) if found else stock
    unstable = {test for test, _, _ in differences(stock, again)}
    for test, without, under in found:
        word = "UNSTABLE" if test in unstable else "DIFFERS"
        print(f"{word} {test}: {without} without patches, {under} with them")
    differing = [test for test, _, _ in found if test not in unstable]
    total = len(stock.outcomes.keys() | patched.outcomes.keys())
    print(f"{len(differing)} of {total} tests end differently" + (f"; {len(unstable)} unstable" if unstable else ""))
    return 1 if differing or not stock.outcomes else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a git repository, with or without a work tree")
    parser.add_argument("ref", help="the tag or commit whose tests to run")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="a folder to import from; repeatable")
    parser.add_argument("--ids", nargs="+", default=list(BUILTIN), help="patches, if not every built-in one")
    parser.add_argument("--undecorated", nargs="+", default=[], help="decorators to leave out: require_non_cpu")
    # argparse leaves a positional argument empty if options come between it and the others.
    ours, for_pytest = _partition(sys.argv[1:], "--")
    return parser.parse_args(ours, argparse.Namespace(pytest=for_pytest))


def _partition(arguments: list[str], separator: str) -> tuple[list[str], list[str]]:
    position = arguments.index(separator) if separator in arguments else len(arguments)
    return arguments[:position], arguments[position + 1 :]


def _timed(name: str, place: Path, options: argparse.Namespace, *, ids: Sequence[str]) -> Suite:
    began = time.monotonic()
    suite = run(place, options.pytest, ids=ids, beside=options.beside)
    print(f"{name}: {suite} ({time.monotonic() - began:.0f} s)", flush=True)
    return suite


if __name__ == "__main__":
    sys.exit(main())
