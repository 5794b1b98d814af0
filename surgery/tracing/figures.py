"""Numbers as people read them, and the marks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["bytes_read", "duration", "mark", "memory", "rate", "ratio", "ticks"]

_MEMORY = ("B", "KiB", "MiB", "GiB", "TiB")


def memory(count: float) -> str:
    """Bytes of memory, in powers of 1024, to three digits."""
    value, unit = _scaled(count, 1024, _MEMORY)
    return f"{_three_digits(value, unit)} {unit}"


def mark(count: float) -> str:
    """Bytes of memory beside an axis, where they are round: without digits that are 0."""
    value, unit = _scaled(count, 1024, _MEMORY)
    return f"{value:.4g} {unit}"


def bytes_read(count: float) -> str:
    """Bytes of files, in powers of 1000, to three digits."""
    value, unit = _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))
    return f"{_three_digits(value, unit)} {unit}"


def rate(count: float, seconds: float) -> str:
    """Bytes of files a second; nothing where nothing was read."""
    return f"{bytes_read(count / seconds)}/s" if count and seconds else ""


def duration(seconds: float) -> str:
    """Milliseconds below a second, seconds below two minutes, then minutes, then hours."""
    if round(seconds, 3) < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def ratio(measured: float, predicted: float) -> str:
    """Measured of predicted: 1.00 is as predicted."""
    return f"{measured / predicted:.2f}" if predicted else ""


def ticks(low: float, high: float, *, about: int, base: int = 10) -> list[float]:
    """Round values from `low` to `high`, about so many: 1, 2 or 5 times a power of 10, or powers of 2 for base 2."""
    span = high - low
    if not span > 0:
        return [low]
    step = _round_step(span / about, base)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _round_step(step: float, base: int) -> float:
    power = float(base) ** math.floor(math.log(step, base))
    multiples: Sequence[int] = (1, 2, 5, 10) if base == 10 else (1, 2)
    return next(multiple * power for multiple in multiples if multiple * power >= step * (1 - 1e-9))


def _scaled(count: float, base: int, units: Sequence[str]) -> tuple[float, str]:
    """In the largest unit of which there is one at least, or the last."""
    power = 0
    while round(count) >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return count, units[power]


def _three_digits(value: float, unit: str) -> str:
    whole = unit == "B" or value >= 100
    return f"{value:,.0f}" if whole else f"{value:.{1 if value >= 10 else 2}f}"
