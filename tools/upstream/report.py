"""Results of a sweep, as a page of the documentation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from packaging.version import Version

from .verdicts import Outcome

__all__ = ["contradictions", "page"]

_INTRODUCTION: Final = """\
# Compatibility

What `patches check` says of every built-in patch under released versions of PEFT and bitsandbytes.
`tools/upstream_sweep.py` installs each release into a folder of its own, asks in a fresh process, and writes this page;
do not edit it.

- `needed`: the probe tried the defect and saw it.
- `obsolete`: the defect is not there, or not even the code that has it elsewhere; a transaction skips the patch.
- `unknown`: the defect is there, outside the window of versions that the patch declares; or the probe could not be run.
- `incompatible`: the target is missing, in a release that is inside the window.

The sweep runs without a GPU. `torch.fsdp2-bit-exact-gather` mends what only GPUs do, and is obsolete here for that
reason; on one, its probe asks the device at hand ([exactness under FSDP2](fsdp2-exactness.md)).
"""

#: Patches whose defect only a GPU has; without one, the probe cannot confirm their version window.
_GPU_ONLY: Final = frozenset({"torch.fsdp2-bit-exact-gather"})


def page(outcomes: Sequence[Outcome], installed: Mapping[str, str]) -> str:
    """Render the page in Markdown. `installed` has the versions of distributions that a combination does not name."""
    ids = sorted({patch_id for outcome in outcomes for patch_id in outcome.verdicts})
    others = ", ".join(f"{name} {version}" for name, version in installed.items())
    parts = [_INTRODUCTION, f"Installed beside them, where nothing else is said: {others}.\n"]
    for swept, fixed in (("peft", "bitsandbytes"), ("bitsandbytes", "peft")):
        row = [outcome for outcome in outcomes if _varies_only(outcome, swept, fixed, installed)]
        if not row:
            continue
        parts.append(f"## By release of {swept}, with {fixed} {installed[fixed]}\n")
        parts.append(
            _table(("patch", "verdicts"), [(f"`{patch_id}`", _runs(row, swept, patch_id)) for patch_id in ids])
        )
    parts.extend(_combinations(outcomes, ids))
    parts.extend(_imports(outcomes))
    parts.extend(_contradictions(outcomes))
    return "\n".join(parts)


def contradictions(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, str, Outcome]]:
    """Find `(id, what, outcome)` for every probe that contradicts the version window.

    This includes an obsolete patch inside its window, which is then wider than the defect.
    """
    for outcome in outcomes:
        for patch_id, found in outcome.verdicts.items():
            outside = " is not in " in found["why"]
            if found["verdict"] == "unknown" and outside and "sees the defect" in found["why"]:
                yield patch_id, "the defect is there, outside the window", outcome
            if found["verdict"] == "obsolete" and not outside and patch_id not in _GPU_ONLY:
                yield patch_id, "the defect is not there, inside the window", outcome


def _varies_only(outcome: Outcome, swept: str, fixed: str, installed: Mapping[str, str]) -> bool:
    return outcome.names == {swept, fixed} and outcome.version(fixed) == installed[fixed]


def _runs(outcomes: Iterable[Outcome], swept: str, patch_id: str) -> str:
    """Format verdicts as `obsolete 0.6.2; needed 0.7.0 to 0.11.1`: releases in order, equal verdicts joined."""
    by_version = {Version(outcome.version(swept)): _word(outcome, patch_id) for outcome in outcomes}
    in_order = sorted(by_version.items())
    runs = []
    for word, group in itertools.groupby(in_order, key=lambda pair: pair[1]):
        versions = [str(version) for version, _ in group]
        runs.append(f"{word} {versions[0]}" + (f" to {versions[-1]}" if len(versions) > 1 else ""))
    return "; ".join(runs)


def _word(outcome: Outcome, patch_id: str) -> str:
    found = outcome.verdicts.get(patch_id)
    if found is None:
        return "not asked"
    return "not importable" if _concerns_a_broken_import(outcome, found["why"]) else found["verdict"]


def _concerns_a_broken_import(outcome: Outcome, why: str) -> bool:
    return any(error.partition(": ")[2][:40] in why for error in outcome.not_importable.values())


def _combinations(outcomes: Sequence[Outcome], ids: Sequence[str]) -> Iterator[str]:
    rows = []
    for outcome in outcomes:
        by_word: dict[str, list[str]] = {}
        for patch_id in ids:
            by_word.setdefault(_word(outcome, patch_id), []).append(f"`{patch_id}`")
        least = {word: found for word, found in by_word.items() if word != "needed"}
        said = "; ".join(f"{word}: {', '.join(found)}" for word, found in sorted(least.items()))
        rows.append((str(outcome), str(len(by_word.get("needed", ()))), outcome.failure or said))
    yield "## Every combination\n"
    yield _table(("combination", "needed", "the others"), rows)


def _imports(outcomes: Sequence[Outcome]) -> Iterator[str]:
    rows = [(str(o), name, f"`{_without_path(error)}`") for o in outcomes for name, error in o.not_importable.items()]
    yield "## What cannot be imported\n"
    yield "Not for a reason of ours: these releases do not work together, with or without patches.\n"
    yield _table(("combination", "library", "error"), rows) if rows else "Everything can.\n"


def _without_path(error: str) -> str:
    return error.partition(" (/")[0][:160]


def _contradictions(outcomes: Sequence[Outcome]) -> Iterator[str]:
    rows = [(f"`{patch_id}`", what, str(outcome)) for patch_id, what, outcome in contradictions(outcomes)]
    yield "## Where a version window and a probe disagree\n"
    yield _table(("patch", "what", "combination"), rows) if rows else "Nowhere.\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"
