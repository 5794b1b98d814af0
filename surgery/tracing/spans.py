"""When phases ran: beside each other, as groups, and all that belongs to loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from surgery.telemetry.measurements import Phase
from surgery.tracing.record import RankTrace

__all__ = ["extent", "lanes", "loading"]

#: Loading that takes less of the time than this is shown by itself too.
SMALL_PART = 0.4


def extent(trace: RankTrace, group: str) -> tuple[float, float] | None:
    """When the first phase of `group` began and its last ended; None if there was none."""
    found = [phase for phase in trace.phases if phase.group == group]
    if not found:
        return None
    return min(phase.start for phase in found), max(phase.start + phase.seconds for phase in found)


def loading(traces: Sequence[RankTrace]) -> tuple[RankTrace, ...]:
    """What `traces` say of their loading alone; nothing unless that is a small part of the time, hard to see."""
    ends = [ends[1] for trace in traces if (ends := extent(trace, "load"))]
    if not ends or max(ends) > SMALL_PART * max(trace.seconds for trace in traces):
        return ()
    return tuple(_until(max(ends), trace) for trace in traces)


def _until(end: float, trace: RankTrace) -> RankTrace:
    return dataclasses.replace(
        trace,
        seconds=min(end, trace.seconds),
        phases=tuple(phase for phase in trace.phases if phase.group == "load"),
        predictions={group: each for group, each in trace.predictions.items() if group == "load"},
        samples=tuple(sample for sample in trace.samples if sample.seconds <= end),
    )


def lanes(phases: Sequence[Phase]) -> list[int]:
    """A lane for each phase, so that no two in a lane overlap; phases are in the order in which they began."""
    ends: list[float] = []
    found = []
    for phase in phases:
        free = next((lane for lane, end in enumerate(ends) if end <= phase.start), len(ends))
        ends[free : free + 1] = [phase.start + phase.seconds]
        found.append(free)
    return found
