"""Numbers and sizes as people and launchers write and read them."""

from __future__ import annotations

import re

from surgery.errors import ConfigError

__all__ = ["parse_size", "say_size", "whole_number"]

#: Nothing that is counted has more digits.
_MOST_DIGITS = 18

_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BY_UNIT = {unit.lower(): size for unit, size in (_BINARY | _DECIMAL).items()}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)


def whole_number(text: str) -> int | None:
    """`text` as an integer of 0 or more, or None if it is not at most 18 decimal digits.

    `int` alone takes other scripts' digits, spaces and underscores, and raises `ValueError` above 4,300 digits.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None


def parse_size(text: str) -> int:
    """`24GiB`, `80 GB` or `512MiB` in bytes, 1 or more. Raises `ConfigError` for anything else."""
    found = _SIZE.fullmatch(text.strip())
    unit = _BY_UNIT.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ConfigError(
            f"expected a size such as 24GiB or 80GB, found {text!r:.80}; units: {', '.join(_BINARY | _DECIMAL)}"
        )
    size = float(found[1]) * unit
    if not 1 <= size < 1 << 63:
        raise ConfigError(f"expected a size above 0, and below 2**63 bytes, found {text!r:.80}")
    return int(size)


def say_size(size: int) -> str:
    """`size` bytes in the largest binary unit up to GiB of which there is one or more, with three digits at least."""
    unit, divisor = next(
        ((name, value) for name, value in reversed(_BINARY.items()) if size >= value and name != "TiB"), ("B", 1)
    )
    value = size / divisor
    digits = 0 if value >= 100 or unit == "B" else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"
