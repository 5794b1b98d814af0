"""Numbers as people and launchers write them, with a bound: nothing that is counted here has more than 18 digits."""

from __future__ import annotations

__all__ = ["whole_number"]

_MOST_DIGITS = 18


def whole_number(text: str) -> int | None:
    """`text` as an integer of 0 or more, or None if it is not at most 18 decimal digits.

    `int` alone takes other scripts' digits, spaces and underscores, and raises `ValueError` above 4,300 digits.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None
