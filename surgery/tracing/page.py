"""The page: every rank's chart and figures in one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from surgery.telemetry.notices import say
from surgery.tracing import figures
from surgery.tracing.axes import Axes
from surgery.tracing.chart import LARGE, SMALL, chart
from surgery.tracing.markup import Element, element, write
from surgery.tracing.record import RankTrace
from surgery.tracing.spans import loading
from surgery.tracing.style import STYLE
from surgery.tracing.tables import phases_table, predictions_table, ranks_table

__all__ = ["render"]

#: Up to this many ranks are shown large and open; more are small, side by side, and open when clicked.
FEW = 4

#: What a browser is allowed to do for the page: apply the style that is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_READING = (
    "Host memory is anonymous memory of the process (RssAnon): what is allocated, libraries that were imported "
    "included, without files that are cached or mapped. Device memory is what torch has allocated; a thin line is what "
    "it has reserved. A step of a line is the most that was seen until the next; what lasts for less than 5 to 50 ms "
    "may go unseen, but device peaks in tables are torch's own. Phases whose bars overlap ran at the same time, in two "
    "threads: peaks and bytes read are then of both. Ranks share their axes, and times are those of "
    "their nodes' clocks."
)


@dataclass(frozen=True)
class _View:
    """A chart for each rank, on the same axes."""

    title: str
    traces: Sequence[RankTrace]
    axes: Axes


def render(traces: Sequence[RankTrace]) -> str:
    """A document of HTML with all of `traces`, of which there is at least one."""
    title = f"Trace of {_ranks(traces[0].world_size)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("title", title),
        element("style", STYLE),
    )
    axes = Axes.of(traces)
    views = _views(traces, axes)
    few = len(traces) <= FEW
    body = element(
        "body",
        element("h1", title),
        *_facts(traces),
        element("h2", "Ranks"),
        ranks_table(traces, axes.kinds),
        element("h2", "Memory over time"),
        _legend(axes),
        element(
            "div",
            *(_rank(trace, number, views, few=few) for number, trace in enumerate(traces)),
            class_="ranks" if few else "ranks many",
        ),
        element("h2", "How to read this"),
        element("p", _READING, class_="quiet"),
    )
    return write(element("html", head, body, lang="en"))


def _views(traces: Sequence[RankTrace], axes: Axes) -> tuple[_View, ...]:
    """The whole run, last; before it the loading, if the whole shows too little of that."""
    whole = _View("The whole run", traces, axes)
    loaded = loading(traces)
    if not loaded:
        return (whole,)
    return _View("Loading", loaded, dataclasses.replace(Axes.of(loaded), colours=axes.colours)), whole


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
        yield element("p", text, class_="alarm")
    for trace in traces:
        if trace.error is not None:
            yield element("p", f"Rank {trace.rank} ended with {trace.error}.", class_="alarm")


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def _legend(axes: Axes) -> Element:
    items = [
        element("li", element("span", class_="swatch"), name, class_=f"phase-{colour}")
        for name, colour in axes.colours.items()
    ]
    return element("ul", *items, class_="legend")


def _rank(trace: RankTrace, number: int, views: Sequence[_View], *, few: bool) -> Element:
    """Charts, and the tables that tell their figures. Of many ranks, each begins small and closed."""
    whole = views[-1]
    rank = element(
        "details",
        element(
            "summary",
            f"Rank {trace.rank}",
            element("span", f" {trace.device}, {figures.duration(trace.seconds)}", class_="quiet"),
            None if few else chart(trace, whole.axes, SMALL),
        ),
        *(part for view in views for part in _chart(view, number)),
        phases_table(trace, whole.axes.kinds),
        predictions_table(trace),
        id=f"rank-{trace.rank}",
    )
    if few:
        rank.set("open", "")
    return rank


def _chart(view: _View, number: int) -> Sequence[Element]:
    return element("h3", view.title), chart(view.traces[number], view.axes, LARGE)
