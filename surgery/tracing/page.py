"""The page: every rank's figures and a chart of its memory, in one HTML file that loads nothing and runs nothing.

It is for a look and for an issue's attachment; for more than a look, open the JSON beside it in a trace viewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from xml.etree.ElementTree import Element, tostring

from surgery.telemetry.measurements import Phase, say
from surgery.telemetry.numbers import say_size
from surgery.tracing.record import KINDS, RankTrace, predicted_peak

__all__ = ["render"]

Cell = Element | str

#: Up to this many ranks are shown open; more open when clicked.
FEW = 4

#: What a browser is allowed to do for the page: apply the style that is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --host: #2f78d6; --device: #d9731a; --predicted: #9b51d0 }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem }
p { max-width: 80ch; overflow-wrap: anywhere } .quiet { opacity: .7 } .problem { color: #d33; font-weight: 600 }
.scroll { max-height: 26rem; overflow: auto } summary { cursor: pointer; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { border-bottom: 1px solid #8884; padding: .2rem .8rem .2rem 0; text-align: right }
th { font-weight: 500; opacity: .7 } th:first-child, td:first-child { text-align: left }
details { background: #8881; border-radius: 6px; margin: .75rem 0; padding: .5rem .75rem }
svg { display: block; height: auto; width: 100% } text { fill: currentColor; font: 11px system-ui, sans-serif }
.bar { fill: #8886 } .band { fill: none; stroke: #8884 } path { fill: none; stroke-width: 1.6 }
path.thin { opacity: .5; stroke-width: 1 } path.host { stroke: var(--host) } path.device { stroke: var(--device) }
.predicted line { stroke: var(--predicted); stroke-dasharray: 6 4 } .predicted text { fill: var(--predicted) }
"""

_READING = (
    "Host memory is anonymous memory of the process (RssAnon): what is allocated, libraries that were imported "
    "included, without files that are cached or mapped. Device memory is what torch has allocated; a thin line is what "
    "it has reserved. A step of a line is the most that was seen until the next; what lasts for less than 5 to 50 ms "
    "may go unseen, but device peaks in tables are torch's own. Phases whose bars overlap ran at the same time, in two "
    "threads: peaks and bytes read are then of both. Ranks share their axes, and times are those of "
    "their nodes' clocks. To zoom in, open the JSON beside this page in https://ui.perfetto.dev."
)

#: Lines of a plot, by kind of memory: their class in the style, and the field of a sample.
_LINES = {"host": {"line": "host"}, "device": {"thin": "device_reserved", "line": "device_allocated"}}

#: Measures of a chart in pixels: a lane of phases, a plot and what is left free around it, a letter.
WIDTH, LEFT, RIGHT, LANE, PLOT, GAP, LETTER = 960, 68, 14, 20, 110, 22, 6.2


def render(traces: Sequence[RankTrace]) -> str:
    """A document of HTML, in ASCII, with all of `traces`, of which there is at least one."""
    title = f"Trace of {_ranks(traces[0].world_size)}"
    axes = _Axes.of(traces)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("title", title),
        element("style", _STYLE),
    )
    columns = ("rank", "device", "took", "read", "read at", *(f"{kind} peak" for kind in axes.kinds), "ended")
    body = element(
        "body",
        element("h1", title),
        *_facts(traces),
        _table("of-ranks", columns, [_rank_row(trace, axes.kinds) for trace in traces]),
        *(_rank(trace, axes, is_open=len(traces) <= FEW) for trace in traces),
        element("p", _READING, class_="quiet"),
    )
    document = tostring(element("html", head, body, lang="en"), encoding="us-ascii", method="html")
    return f"<!DOCTYPE html>\n{document.decode()}\n"


def _facts(traces: Sequence[RankTrace]) -> Iterator[Element]:
    began = datetime.fromtimestamp(min(trace.started for trace in traces), UTC)
    devices = ", ".join(dict.fromkeys(trace.device for trace in traces))
    yield element("p", f"Began {began:%Y-%m-%d %H:%M:%S} UTC, on {devices}.", class_="quiet")
    # The same on every rank that has come so far.
    converted = next((trace.read_once_per_node for trace in traces if trace.read_once_per_node), None)
    if converted:
        yield element("p", say("read_once_per_node", converted), class_="quiet")
    missing = sorted(set(range(traces[0].world_size)) - {trace.rank for trace in traces})
    if missing:
        numbers = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        text = f"No file yet of {_ranks(len(missing))}: {numbers}. Draw again with: surgery trace DIR"
        yield element("p", text, class_="problem")
    for trace in traces:
        if trace.error is not None:
            yield element("p", f"Rank {trace.rank} ended with {trace.error}.", class_="problem")


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def _rank(trace: RankTrace, axes: _Axes, *, is_open: bool) -> Element:
    said = element("span", f" {trace.device}, {duration(trace.seconds)}", class_="quiet")
    rank = element(
        "details",
        element("summary", f"Rank {trace.rank}", said),
        _chart(trace, axes),
        _phases_table(trace, axes.kinds),
        _predictions_table(trace),
        id=f"rank-{trace.rank}",
    )
    if is_open:
        rank.set("open", "")
    return rank


def _rank_row(trace: RankTrace, kinds: Sequence[str]) -> Sequence[Cell]:
    # Phases that overlap are told of the same bytes: neither those nor their seconds may be added up.
    reading = [(phase.start, phase.start + phase.seconds) for phase in trace.phases if phase.bytes_read]
    seconds = max((end for _, end in reading), default=0.0) - min((start for start, _ in reading), default=0.0)
    return (
        element("a", str(trace.rank), href=f"#rank-{trace.rank}"),
        trace.device,
        measured(trace.seconds, duration(trace.seconds)),
        measured(trace.bytes_read, file_bytes(trace.bytes_read)),
        rate(trace.bytes_read, seconds),
        *(memory(max((_peak(phase, kind) for phase in trace.phases), default=0)) for kind in kinds),
        trace.error or "done",
    )


def _phases_table(trace: RankTrace, kinds: Sequence[str]) -> Element:
    """A row for each phase of a rank."""
    head = ("phase", "began at", "took", "read", "read at", "host before", *(f"{kind} peak" for kind in kinds))
    rows: list[Sequence[Cell]] = [
        (
            phase.name,
            measured(phase.start, duration(phase.start)),
            measured(phase.seconds, duration(phase.seconds)),
            measured(phase.bytes_read, file_bytes(phase.bytes_read)),
            rate(phase.bytes_read, phase.seconds),
            memory(phase.host_before),
            *(memory(_peak(phase, kind)) for kind in kinds),
        )
        for phase in trace.phases
    ]
    return _table("of-phases", head, rows)


def _predictions_table(trace: RankTrace) -> Element | None:
    """A row for each peak that was predicted and measured; None if none was."""
    rows = list(_prediction_rows(trace))
    if not rows:
        return None
    heading = element("h3", "Predicted and measured peaks, above what was held when they were predicted")
    head = ("phases", "memory", "predicted", "measured", "measured / predicted")
    return element("div", heading, _table("of-predictions", head, rows))


def _prediction_rows(trace: RankTrace) -> Iterator[Sequence[Cell]]:
    for group, prediction in trace.predictions.items():
        for kind in KINDS:
            predicted: int | None = getattr(prediction, kind)
            peaks = [_peak(phase, kind) for phase in trace.phases if phase.group == group]
            if predicted is None or not peaks:
                continue
            found = max(max(peaks) - int(getattr(prediction, f"{kind}_before")), 0)
            ratio = f"{found / predicted:.2f}" if predicted else ""
            yield group, kind, memory(predicted), memory(found), ratio


def _peak(phase: Phase, kind: str) -> int:
    return int(getattr(phase, f"{kind}_peak"))


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Element:
    header = element("thead", element("tr", *(element("th", text) for text in head)))
    body = element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows))
    return element("div", element("table", header, body, class_=name), class_="scroll")


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Axes that the charts of all ranks share, so that they can be compared by eye.

    seconds: since the first rank `began`. memory: the highest value of each kind that is shown, in bytes.
    """

    began: float
    seconds: float
    memory: Mapping[str, int]

    @classmethod
    def of(cls, traces: Sequence[RankTrace]) -> _Axes:
        began = min(trace.started for trace in traces)
        kinds = max((trace.kinds for trace in traces), key=len)
        return cls(
            began=began,
            seconds=max(trace.started - began + trace.seconds for trace in traces) or 1.0,
            memory={kind: max([1, *(value for trace in traces for value in _values(trace, kind))]) for kind in kinds},
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.memory)

    def x(self, trace: RankTrace, seconds: float) -> float:
        """The place, in pixels, of what was so many seconds after `trace` began."""
        return LEFT + (trace.started - self.began + seconds) / self.seconds * (WIDTH - LEFT - RIGHT)


def _values(trace: RankTrace, kind: str) -> Iterator[int]:
    """All values that a plot of `kind` shows."""
    yield from (getattr(sample, field) for field in _LINES[kind].values() for sample in trace.samples)
    yield from (_peak(phase, kind) for phase in trace.phases)
    yield from (predicted_peak(each, kind) or 0 for each in trace.predictions.values())


def _chart(trace: RankTrace, axes: _Axes) -> Element:
    """The phases of a rank in lanes, and under them its memory over time, a plot for each kind."""
    lanes = trace.lanes()
    top = (max(lanes, default=-1) + 1) * LANE + GAP
    bottom = top + len(axes.kinds) * (PLOT + GAP)
    label = f"Memory of rank {trace.rank} over time"
    picture = element("svg", viewBox=f"0 0 {WIDTH} {bottom}", role="img", aria_label=label)
    for phase, lane in zip(trace.phases, lanes, strict=True):
        left, right = axes.x(trace, phase.start), axes.x(trace, phase.start + phase.seconds)
        width, y = max(right - left, 1.0), float(lane * LANE)
        picture.append(
            element(
                "g",
                element("title", f"{phase.name}: {duration(phase.seconds)}"),
                element("rect", class_="band", x=left, y=y, width=width, height=bottom - GAP - y),
                element("rect", class_="bar", x=left, y=y, width=width, height=LANE - 2),
                element("text", phase.name, x=left + 4, y=y + 13) if width > len(phase.name) * LETTER + 8 else None,
            )
        )
    for number, kind in enumerate(axes.kinds):
        picture.extend(_plot(trace, axes, kind, top + number * (PLOT + GAP)))
    picture.append(element("text", duration(axes.seconds), x=WIDTH - RIGHT, y=bottom - 6, text_anchor="end"))
    return picture


def _plot(trace: RankTrace, axes: _Axes, kind: str, top: int) -> Iterator[Element]:
    """Lines of samples and of predictions, from 0 to the highest value of all ranks; y grows downwards."""
    highest = axes.memory[kind]

    def y(value: int) -> float:
        return top + (1 - value / highest) * PLOT

    yield element("text", kind, x=LEFT - 6, y=y(0), text_anchor="end")
    yield element("text", say_size(highest), x=LEFT - 6, y=top + 8, text_anchor="end")
    for style, field in _LINES[kind].items():
        # Steps, since a sample holds until the next. Of those on one pixel, the highest is drawn.
        columns: dict[int, int] = {}
        for sample in trace.samples:
            column = round(axes.x(trace, sample.seconds))
            columns[column] = max(getattr(sample, field), columns.get(column, 0))
        if columns:
            (start, first), *steps = columns.items()
            line = [f"M{start} {y(first):.1f}", *(f"H{column}V{y(value):.1f}" for column, value in steps)]
            end = f"H{axes.x(trace, trace.seconds):.0f}"
            yield element("path", class_=f"{style} {kind}", d="".join((*line, end)))
    for group, prediction in trace.predictions.items():
        peak, extent = predicted_peak(prediction, kind), trace.extent(group)
        if peak is None or extent is None:
            continue
        left, right = (axes.x(trace, seconds) for seconds in extent)
        text = f"{group}: {say_size(getattr(prediction, kind))} predicted"
        x = min(left + 2, WIDTH - RIGHT - len(text) * LETTER)
        yield element(
            "g",
            element("line", x1=left, x2=right, y1=y(peak), y2=y(peak)),
            element("text", text, x=x, y=y(peak) - 4),
            class_="predicted",
        )


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


def _text(value: str | float) -> str:
    """Text of a value: coordinates in tenths of a pixel, anything else as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
