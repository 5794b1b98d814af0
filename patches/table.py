"""Plain tables for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with each column as wide as its widest cell; line breaks inside a cell become spaces."""
    lines = [[" ".join(cell.split("\n")) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
