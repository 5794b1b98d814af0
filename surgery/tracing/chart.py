"""One rank as a picture: its phases in lanes, and under them its memory over time, a plot for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from surgery.telemetry.measurements import Phase, Sample
from surgery.tracing import figures
from surgery.tracing.axes import Axes, Range
from surgery.tracing.kinds import Kind
from surgery.tracing.markup import Element, element
from surgery.tracing.record import RankTrace
from surgery.tracing.spans import extent, lanes

__all__ = ["LARGE", "SMALL", "Size", "chart"]

#: Widths in pixels: of a letter in the label of a phase, and around it.
LETTER, PADDING = 6.2, 8
GAP = 22


@dataclass(frozen=True, kw_only=True)
class Size:
    """Measures of a chart, in pixels; `left` has the labels of the axis. `ticks` is about how many there are."""

    width: int
    plot: int
    lane: int
    ticks: tuple[int, int]
    left: int = 68
    right: int = 14
    bottom: int = 22


LARGE = Size(width=960, plot=150, lane=18, ticks=(10, 4))
SMALL = Size(width=320, plot=64, lane=7, ticks=(4, 2))


def chart(trace: RankTrace, axes: Axes, size: Size) -> Element:
    """An SVG element, as wide as there is room, in the colours of the page."""
    return _Chart(trace, axes, size).draw()


class _Chart:
    """The chart of one rank. y grows downwards, as in SVG."""

    def __init__(self, trace: RankTrace, axes: Axes, size: Size) -> None:
        self.trace, self.axes, self.size = trace, axes, size
        self.offset = trace.started - axes.began
        self.lanes = lanes(trace.phases)
        self.top = (max(self.lanes, default=-1) + 1) * (size.lane + 2) + GAP
        self.bottom = self.top + len(axes.kinds) * (size.plot + GAP) - GAP

    def draw(self) -> Element:
        """Bands lie under everything, lines over everything."""
        picture = element(
            "svg",
            viewBox=f"0 0 {self.size.width} {self.bottom + self.size.bottom}",
            role="img",
            aria_label=f"Memory of rank {self.trace.rank} over time",
        )
        picture.extend(self._phases())
        picture.extend(self._time_axis())
        for number, kind in enumerate(self.axes.kinds):
            picture.extend(self._plot(kind, top=self.top + number * (self.size.plot + GAP)))
        return picture

    def _x(self, seconds: float) -> float:
        """Of seconds since this rank began."""
        room = self.size.width - self.size.left - self.size.right
        return self.size.left + self.axes.seconds.share(self.offset + seconds) * room

    def _y(self, value: float, within: Range, top: float) -> float:
        return top + (1 - within.share(value)) * self.size.plot

    def _phases(self) -> Iterator[Element]:
        for phase, lane in zip(self.trace.phases, self.lanes, strict=True):
            left, right = self._x(phase.start), self._x(phase.start + phase.seconds)
            top, width = lane * (self.size.lane + 2) + 2.0, max(right - left, 1.0)
            colour = f"phase-{self.axes.colours[phase.name]}"
            yield element(
                "g",
                element("title", f"{phase.name}: {figures.duration(phase.seconds)}"),
                element("rect", class_="band", x=left, y=top, width=width, height=self.bottom - top),
                element("rect", class_="bar", x=left, y=top, width=width, height=self.size.lane),
                self._name(phase, left, top, width),
                class_=colour,
            )

    def _name(self, phase: Phase, left: float, top: float, width: float) -> Element | None:
        """Where there is room for it; the legend and the table have it too."""
        if self.size.lane < LARGE.lane or width < len(phase.name) * LETTER + PADDING:
            return None
        return element("text", phase.name, x=left + PADDING / 2, y=top + 13)

    def _time_axis(self) -> Iterator[Element]:
        shown = self.axes.seconds
        for seconds in figures.ticks(shown.low, shown.high, about=self.size.ticks[0]):
            x = self._x(seconds - self.offset)
            yield element("line", class_="grid", x1=x, x2=x, y1=float(self.top), y2=float(self.bottom))
            yield element("text", f"{seconds:g} s", class_="tick", x=x, y=self.bottom + 15, text_anchor="middle")

    def _plot(self, kind: Kind, *, top: float) -> Iterator[Element]:
        within = self.axes.memory[kind.name]
        left, right = self.size.left, self.size.width - self.size.right
        yield element("text", kind.title, class_="title", x=left, y=top - 6.0)
        for value in figures.ticks(within.low, within.high, about=self.size.ticks[1], base=2):
            y = self._y(value, within, top)
            yield element("line", class_="grid", x1=left, x2=right, y1=y, y2=y)
            yield element("text", figures.mark(value), class_="tick", x=left - 6, y=y + 4, text_anchor="end")
        for style, series in kind.series.items():
            outline = self._outline(series, lambda value: self._y(value, within, top))
            yield element("path", class_=f"{style} {kind.name}", d=outline)
        yield from self._predictions(kind, within, top)

    def _outline(self, series: Callable[[Sample], int], y: Callable[[float], float]) -> str:
        """Steps: a sample holds until the next. Of those on one pixel, the highest is drawn."""
        columns: dict[int, int] = {}
        for sample in self.trace.samples:
            column = round(self._x(sample.seconds))
            columns[column] = max(series(sample), columns.get(column, 0))
        if not columns:
            return ""
        (start, first), *steps = columns.items()
        drawn = [f"M{start} {y(first):.1f}", *(f"H{column}V{y(value):.1f}" for column, value in steps)]
        return "".join(drawn) + f"H{self._x(self.trace.seconds):.0f}"

    def _predictions(self, kind: Kind, within: Range, top: float) -> Iterator[Element]:
        for group, prediction in self.trace.predictions.items():
            expected, between = kind.predicted(prediction), extent(self.trace, group)
            if expected is None or between is None:
                continue
            left, right = map(self._x, between)
            y = self._y(kind.before(prediction) + expected, within, top)
            label = f"{group}: {figures.memory(expected)} predicted"
            yield element(
                "g",
                element("title", label),
                element("line", x1=left, x2=right, y1=y, y2=y),
                self._label(label, left, y),
                class_="predicted",
            )

    def _label(self, text: str, left: float, y: float) -> Element | None:
        if self.size is SMALL:
            return None
        room = self.size.width - self.size.right - len(text) * LETTER
        return element("text", text, x=min(left + 2, room), y=y - 4)
