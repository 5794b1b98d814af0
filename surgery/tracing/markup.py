"""Elements of HTML and SVG. Text and attributes are escaped when they are written, whoever has made them."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

__all__ = ["Element", "element", "measured", "write"]


def element(tag: str, /, *children: Element | str | None, **attributes: str | float) -> Element:
    """An element. Of attribute names, `_` at the end is dropped (`class_`), and others are `-` (`text_anchor`).

    Children that are None are left out.
    """
    made = Element(tag, {key.rstrip("_").replace("_", "-"): _text(value) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None:
            _append_text(made, child)
    return made


def measured(value: float, shown: str) -> Element:
    """A figure, shown for people, with its exact value for programs."""
    return element("data", shown, value=str(value))


def write(root: Element) -> str:
    """A document of HTML, in ASCII: whatever a name may hold, it can be encoded."""
    return f"<!DOCTYPE html>\n{tostring(root, encoding='us-ascii', method='html').decode()}\n"


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def _text(value: str | float) -> str:
    """Coordinates are tenths of a pixel; anything else is as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
