"""Check every built-in patch against released versions of PEFT and bitsandbytes, and write the verdicts.

    python tools/upstream_sweep.py                                         # the whole sweep: docs/compatibility.md
    python tools/upstream_sweep.py --pair 0.11.1 0.43.0 --output -         # one combination: peft, bitsandbytes

Releases are installed below `build/upstream`, without their dependencies, and stay there: 3 GB for the whole sweep,
most of it bitsandbytes. A combination takes about 15 seconds. The exit code is 1 if `patches check` failed, or if a
probe finds a defect outside the version window of its patch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from patches.builtin import BUILTIN
from upstream.releases import InstallError, Release, install
from upstream.report import contradictions, page
from upstream.torch_rows import rows_of, with_rows
from upstream.verdicts import Outcome, check

# The last release of each minor version, and the releases on both sides of every end of a version window.
# fmt: off
PEFT: Final = (
    "0.6.2", "0.7.0", "0.9.0", "0.10.0", "0.11.1", "0.12.0", "0.13.2", "0.14.0", "0.15.2", "0.16.0", "0.17.1", "0.18.1",
    "0.19.1", "0.20.0", "0.21.0", "0.21.1", "0.21.2",
)
BITSANDBYTES: Final = (
    "0.43.0", "0.43.3", "0.44.1", "0.45.5", "0.46.1", "0.47.0", "0.48.2", "0.49.0", "0.49.2", "0.50.0", "0.50.2",
)
# fmt: on
OLD_PAIRS: Final = (("0.7.0", "0.43.0"), ("0.11.1", "0.43.0"), ("0.11.1", "0.47.0"), ("0.12.0", "0.46.1"))

# PEFT 0.16 and 0.17 import names that transformers 5 no longer has; the older transformers needs its own hub client.
OLD_TRANSFORMERS: Final = Release(
    name="transformers", version="4.57.6", with_also=("huggingface_hub==0.36.2", "tokenizers==0.22.2")
)

_FOLDER: Final = Path("build/upstream")
_PAGE: Final = Path("docs/compatibility.md")


def main() -> int:
    """Run the sweep; returns the exit code."""
    options = _parse()
    installed = {
        name: metadata.version(name) for name in ("peft", "bitsandbytes", "accelerate", "transformers", "torch")
    }
    outcomes = []
    for peft, bitsandbytes in options.pair or _pairs(installed):
        for outcome in _ask(Release(name="peft", version=peft), Release(name="bitsandbytes", version=bitsandbytes)):
            print(f"{outcome}: {_short(outcome)}", file=sys.stderr, flush=True)
            outcomes.append(outcome)
    text = page(outcomes, installed)
    if options.output == str(_PAGE):
        text = with_rows(text, rows_of(_PAGE.read_text()))  # written by torch_sweep.py
    if options.output == "-":
        print(text)
    else:
        Path(options.output).write_text(text)
    too_narrow = [found for found in contradictions(outcomes) if "outside the window" in found[1]]
    return 1 if too_narrow or any(outcome.failure for outcome in outcomes) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, action="append", metavar=("PEFT", "BITSANDBYTES"), help="repeatable")
    parser.add_argument("--output", default=str(_PAGE), help="the page to write; - for standard output")
    return parser.parse_args()


def _pairs(installed: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((peft, installed["bitsandbytes"]) for peft in PEFT)
    yield from ((installed["peft"], version) for version in BITSANDBYTES if version != installed["bitsandbytes"])
    yield from OLD_PAIRS


def _ask(*releases: Release) -> Iterator[Outcome]:
    """The outcome of one combination, and of the same with an older transformers if PEFT needs it."""
    outcome = _outcome(releases)
    yield outcome
    if "transformers" in outcome.not_importable.get("peft", ""):
        yield _outcome([*releases, OLD_TRANSFORMERS])


def _outcome(releases: Sequence[Release]) -> Outcome:
    try:
        folders = [install(release, _FOLDER) for release in releases]
    except InstallError as error:
        return Outcome(releases=tuple(releases), failure=str(error))
    return check(releases, folders, list(BUILTIN))


def _short(outcome: Outcome) -> str:
    if outcome.failure:
        return outcome.failure
    return ", ".join(f"{count} {word}" for word, count in _counts(f["verdict"] for f in outcome.verdicts.values()))


def _counts(words: Iterable[str]) -> list[tuple[str, int]]:
    found = list(words)
    return sorted((word, found.count(word)) for word in set(found))


if __name__ == "__main__":
    sys.exit(main())
