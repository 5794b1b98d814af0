"""Summaries as a self-contained SVG plot, which follows the reader's choice of light or dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, indent, tostring

from loading.summary import Summary

__all__ = ["chart"]

GIB = 1024**3

#: Widths in pixels. Labels are left of the bars, values right of them.
WIDTH, LABELS, VALUES, BAR, ROW, HEAD = 720, 150, 110, 14, 22, 34

#: Prefixes of the ways that are not this project's.
OTHERS = ("read", "seed", "accelerate")

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.ours { fill: #2f6fde }
.others { fill: #8c959f }
.range { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .range { stroke: #e6edf3 } }
"""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity. value: of a way, or None. spread: its minimum and maximum over several turns."""

    title: str
    value: Callable[[Summary], float | None]
    shown: str
    spread: Callable[[Summary], tuple[float, float] | None] = lambda _: None


PANELS = (
    Panel(
        title="ready to train, seconds (line: least to most of several turns)",
        value=lambda summary: summary.seconds,
        shown="{:.2f} s",
        spread=lambda summary: (min(summary.ready), max(summary.ready)) if len(summary.ready) > 1 else None,
    ),
    Panel(
        title="peak of the GPU while loading, GiB",
        value=lambda summary: summary.device / GIB if summary.device else None,
        shown="{:.2f} GiB",
    ),
    Panel(
        title="peak of anonymous host memory above imports, GiB, the rank with most",
        value=lambda summary: max(summary.hosts) / GIB if summary.hosts else None,
        shown="{:.2f} GiB",
    ),
    Panel(title="median step, seconds", value=lambda summary: summary.median_step, shown="{:.3f} s"),
)


def chart(summaries: Sequence[Summary]) -> str:
    """Draw a panel for each quantity that some way has."""
    panels = [panel for panel in PANELS if any(panel.value(summary) is not None for summary in summaries)]
    height = HEAD + ROW * len(summaries)
    size = {"width": str(WIDTH), "height": str(height * len(panels))}
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "role": "img"})
    _child(root, "title", "Loading in several ways")
    _child(root, "style", STYLE)
    for number, panel in enumerate(panels):
        _draw(root, panel, summaries, top=number * height)
    indent(root)
    return tostring(root, encoding="unicode")


def _draw(root: Element, panel: Panel, summaries: Sequence[Summary], *, top: float) -> None:
    _child(root, "text", panel.title, x=8, y=top + 20, class_="title")
    ends = [spread[1] for summary in summaries if (spread := panel.spread(summary))]
    most = max([*ends, *(panel.value(summary) or 0.0 for summary in summaries)]) or 1.0
    scale = (WIDTH - LABELS - VALUES) / most
    for number, summary in enumerate(summaries):
        _draw_row(root, panel, summary, y=top + HEAD + number * ROW, scale=scale)


def _draw_row(root: Element, panel: Panel, summary: Summary, *, y: float, scale: float) -> None:
    middle = y + BAR / 2
    _child(root, "text", summary.way, x=LABELS - 8, y=middle + 4, text_anchor="end")
    value = panel.value(summary)
    if value is None:
        _child(root, "text", _why_not(summary), x=LABELS + 4, y=middle + 4)
        return
    kind = "others" if summary.way.startswith(OTHERS) else "ours"
    _child(root, "rect", x=LABELS, y=y, width=max(value * scale, 1.0), height=BAR, rx=2, class_=kind)
    end = value
    if spread := panel.spread(summary):
        x1, x2 = (LABELS + each * scale for each in spread)
        _child(root, "line", x1=x1, x2=x2, y1=middle, y2=middle, class_="range")
        end = spread[1]
    _child(root, "text", panel.shown.format(value), x=LABELS + end * scale + 6, y=middle + 4)


def _why_not(summary: Summary) -> str:
    return "none" if summary.error is None else summary.error.split(":")[0]


def _child(parent: Element, tag: str, text: str | None = None, **attributes: float | str) -> None:
    """Add a child element. In attribute names, a final `_` is dropped (`class_`), and others become `-`."""
    written = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for name, value in attributes.items()
    }
    child = Element(tag, written)
    child.text = text
    parent.append(child)
