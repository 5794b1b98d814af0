"""Elements of HTML and SVG, and figures as people read them.

Text and attributes are escaped when they are written, whoever has made them.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from surgery.telemetry.numbers import say_size

__all__ = ["Element", "duration", "element", "file_bytes", "measured", "memory", "rate", "write"]


def element(tag: str, /, *children: Element | str | None, **attributes: str | float) -> Element:
    """Make an element; text comes first among its children, and None is left out.

    In attribute names, `_` at the end is dropped (`class_`), and others are `-` (`text_anchor`).
    """
    made = Element(tag, {key.rstrip("_").replace("_", "-"): _text(value) for key, value in attributes.items()})
    made.text = "".join(child for child in children if isinstance(child, str))
    made.extend(child for child in children if isinstance(child, Element))
    return made


def measured(value: float, shown: str) -> Element:
    """A figure, shown for people, with its exact value for programs."""
    return element("data", shown, value=str(value))


def memory(count: int) -> Element:
    """Bytes of memory, in powers of 1024."""
    return measured(count, say_size(count))


def file_bytes(count: float) -> str:
    """Bytes of files, in powers of 1000, to three digits."""
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while round(count) >= 1000 and (larger := next(units, None)):
        count, unit = count / 1000, larger
    return f"{count:,.{0 if unit == 'B' or count >= 100 else 1 if count >= 10 else 2}f} {unit}"


def rate(count: float, seconds: float) -> str:
    """Bytes of files a second; empty if nothing was read."""
    return f"{file_bytes(count / seconds)}/s" if count and seconds else ""


def duration(seconds: float) -> str:
    """Milliseconds below a second, seconds below two minutes, then minutes, then hours."""
    if round(seconds, 3) < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def write(root: Element) -> str:
    """A document of HTML, in ASCII: whatever a name may hold, it can be encoded."""
    return f"<!DOCTYPE html>\n{tostring(root, encoding='us-ascii', method='html').decode()}\n"


def _text(value: str | float) -> str:
    """Coordinates in tenths of a pixel; anything else as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
