"""Bar charts as self-contained SVG, which follows the reader's choice of light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, indent, tostring

__all__ = ["Bar", "Panel", "draw"]

#: Widths in pixels. Labels are left of the bars, values right of them.
WIDTH, VALUES, BAR, ROW, HEAD = 720, 110, 14, 22, 34

#: Pixels of a label: at least, and for each of its letters.
LABELS, LETTER = 150, 7

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.ours { fill: #2f6fde }
.others { fill: #8c959f }
.range { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .range { stroke: #e6edf3 } }
"""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar. value: its length; None writes `note` instead. spread: least and most of several turns."""

    label: str
    ours: bool
    value: float | None
    spread: tuple[float, float] | None = None
    note: str = "none"

    @property
    def end(self) -> float:
        """Length up to where it or its spread reaches."""
        return max(self.value or 0.0, self.spread[1] if self.spread else 0.0)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity. shown: format of a value."""

    title: str
    shown: str
    bars: Sequence[Bar]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Draw panels below each other, without those that have no value."""
    shown = [panel for panel in panels if any(bar.value is not None for bar in panel.bars)]
    labels = max([LABELS, *(16 + LETTER * len(bar.label) for panel in shown for bar in panel.bars)])
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "width": str(WIDTH), "role": "img"})
    _child(root, "title", title)
    _child(root, "style", STYLE)
    top = 0
    for panel in shown:
        _draw(root, panel, top=top, labels=labels)
        top += HEAD + ROW * len(panel.bars)
    root.set("height", str(top))
    indent(root)
    return tostring(root, encoding="unicode")


def _draw(root: Element, panel: Panel, *, top: int, labels: int) -> None:
    _child(root, "text", panel.title, x=8, y=top + 20, class_="title")
    scale = (WIDTH - labels - VALUES) / (max(bar.end for bar in panel.bars) or 1.0)
    for number, bar in enumerate(panel.bars):
        _draw_bar(root, bar, panel.shown, x=labels, y=top + HEAD + number * ROW, scale=scale)


def _draw_bar(root: Element, bar: Bar, shown: str, *, x: float, y: float, scale: float) -> None:
    middle = y + BAR / 2
    _child(root, "text", bar.label, x=x - 8, y=middle + 4, text_anchor="end")
    if bar.value is None:
        _child(root, "text", bar.note, x=x + 4, y=middle + 4)
        return
    kind = "ours" if bar.ours else "others"
    _child(root, "rect", x=x, y=y, width=max(bar.value * scale, 1.0), height=BAR, rx=2, class_=kind)
    if bar.spread:
        x1, x2 = (x + each * scale for each in bar.spread)
        _child(root, "line", x1=x1, x2=x2, y1=middle, y2=middle, class_="range")
    _child(root, "text", shown.format(bar.value), x=x + bar.end * scale + 6, y=middle + 4)


def _child(parent: Element, tag: str, text: str | None = None, **attributes: float | str) -> None:
    """Add a child element. In attribute names, a final `_` is dropped (`class_`), and others become `-`."""
    written = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for name, value in attributes.items()
    }
    child = Element(tag, written)
    child.text = text
    parent.append(child)
