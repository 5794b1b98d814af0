"""The rows of `docs/compatibility.md` for releases of torch, each from a separate run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from packaging.version import Version

from .verdicts import Outcome

__all__ = ["row", "rows_of", "with_rows"]

_HEADING: Final = "## By release of torch\n"
_INTRODUCTION: Final = """
Each from a run of `tools/torch_sweep.py` in an environment of its own, without a GPU: the probes, and the tests of the
built-in patches and of exactness.

| torch | beside it | needed | the others | tests |
| --- | --- | --- | --- | --- |
"""
_ROW: Final = re.compile(r"^\| (\d+\.\d+\S*) \| .+ \|$", re.MULTILINE)


def row(version: str, beside: Mapping[str, str], verdicts: Outcome, tests: Mapping[str, str]) -> str:
    """One line of the table. tests: test -> outcome; empty if not run."""
    by_word: dict[str, list[str]] = {}
    for patch_id, found in verdicts.verdicts.items():
        by_word.setdefault(found["verdict"], []).append(f"`{patch_id}`")
    needed = by_word.pop("needed", [])
    others = "; ".join(f"{word}: {', '.join(found)}" for word, found in sorted(by_word.items()))
    cells = (
        version,
        ", ".join(f"{name} {number}" for name, number in beside.items()),
        str(len(needed)),
        verdicts.failure or others or "none",
        _said(tests),
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _said(tests: Mapping[str, str]) -> str:
    found = list(tests.values())
    counts = ", ".join(
        f"{found.count(word):,} {word}" for word in ("passed", "failed", "error", "skipped") if word in found
    )
    bad = sorted(test.rpartition("::")[2] for test, word in tests.items() if word not in ("passed", "skipped"))
    return (counts or "not run") + (f": {', '.join(f'`{name}`' for name in bad)}" if bad else "")


def rows_of(page: str) -> dict[str, str]:
    """Version -> line, of the rows on a page."""
    section = page.partition(_HEADING)[2].partition("\n## ")[0]
    return {found[1]: found[0] for found in _ROW.finditer(section)}


def with_rows(page: str, rows: Mapping[str, str]) -> str:
    """Replace the rows on the page by these, in the order of versions; if it had none, add them at the end."""
    before, _, rest = page.partition(_HEADING)
    after = rest.partition("\n## ")[2]
    if not rows:
        return page
    lines = "\n".join(rows[version] for version in sorted(rows, key=Version)) + "\n"
    made = f"{before.rstrip()}\n\n{_HEADING}{_INTRODUCTION}{lines}"
    return f"{made}\n## {after}" if after else made
