"""A library that draws text, with two defects."""

from __future__ import annotations

WIDTH = 4


def rule() -> str:
    return WIDTH * "-"


def heading(text: str) -> str:
    return f"{text.lower()}\n{rule()}"
