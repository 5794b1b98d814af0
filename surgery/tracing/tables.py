"""The figures under the pictures, each with its exact value beside what is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from surgery.telemetry.measurements import Phase
from surgery.tracing import figures
from surgery.tracing.kinds import DEVICE, HOST, Kind, measured_peak
from surgery.tracing.markup import Element, element, measured
from surgery.tracing.record import RankTrace

__all__ = ["phases_table", "predictions_table", "ranks_table"]

Cell = Element | str


def ranks_table(traces: Sequence[RankTrace], kinds: Sequence[Kind]) -> Element:
    """A row for each rank, over all of its phases."""
    head = ("rank", "device", "took", "read", "read at", *(f"{kind.name} peak" for kind in kinds), "ended")
    return _table("of-ranks", head, [_rank_row(trace, kinds) for trace in traces])


def phases_table(trace: RankTrace, kinds: Sequence[Kind]) -> Element:
    """A row for each phase of a rank."""
    head = ("phase", "began at", "took", "read", "read at", "host before", *(f"{kind.name} peak" for kind in kinds))
    return _table("of-phases", head, [_phase_row(phase, kinds) for phase in trace.phases])


def predictions_table(trace: RankTrace) -> Element | None:
    """A row for each peak that was predicted and measured; None if none was."""
    rows = list(_prediction_rows(trace))
    if not rows:
        return None
    heading = element("h3", "Predicted and measured peaks, above what was held when they were predicted")
    head = ("phases", "memory", "predicted", "measured", "measured / predicted")
    return element("div", heading, _table("of-predictions", head, rows))


def _rank_row(trace: RankTrace, kinds: Sequence[Kind]) -> Sequence[Cell]:
    # Phases that overlap are told of the same bytes: neither those nor their seconds may be added up.
    reading = [(phase.start, phase.start + phase.seconds) for phase in trace.phases if phase.bytes_read]
    seconds = max((end for _, end in reading), default=0.0) - min((start for start, _ in reading), default=0.0)
    return (
        element("a", str(trace.rank), href=f"#rank-{trace.rank}"),
        trace.device,
        measured(trace.seconds, figures.duration(trace.seconds)),
        measured(trace.bytes_read, figures.bytes_read(trace.bytes_read)),
        figures.rate(trace.bytes_read, seconds),
        *(_memory(max(map(kind.peak, trace.phases), default=0)) for kind in kinds),
        trace.error or "done",
    )


def _phase_row(phase: Phase, kinds: Sequence[Kind]) -> Sequence[Cell]:
    return (
        phase.name,
        measured(phase.start, figures.duration(phase.start)),
        measured(phase.seconds, figures.duration(phase.seconds)),
        measured(phase.bytes_read, figures.bytes_read(phase.bytes_read)),
        figures.rate(phase.bytes_read, phase.seconds),
        _memory(phase.host_before),
        *(_memory(kind.peak(phase)) for kind in kinds),
    )


def _prediction_rows(trace: RankTrace) -> Iterator[Sequence[Cell]]:
    for group, prediction in trace.predictions.items():
        for kind in (HOST, DEVICE):
            predicted, found = kind.predicted(prediction), measured_peak(trace, group, kind)
            if predicted is not None and found is not None:
                yield group, kind.name, _memory(predicted), _memory(found), figures.ratio(found, predicted)


def _memory(count: int) -> Element:
    return measured(count, figures.memory(count))


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Element:
    header = element("thead", element("tr", *(element("th", text) for text in head)))
    body = element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows))
    return element("div", element("table", header, body, class_=name), class_="scroll")
