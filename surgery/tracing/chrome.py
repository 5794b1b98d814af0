"""Chrome's trace format, which https://ui.perfetto.dev and chrome://tracing open and draw better than we could.

A rank is a process of it; a thread is a lane of phases, as many as it takes for none to overlap in one; memory is in
counters. Times are whole microseconds since the first rank began, by the clocks of the nodes. Viewers read
`traceEvents` and skip the rest of the file. https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.telemetry.measurements import History, MemorySample
from surgery.tracing.record import RankTrace, predicted_peak

__all__ = ["Event", "trace_events"]

Event = dict[str, Any]

#: Samples of all ranks together, and of each at least, up to which all are drawn: a viewer has to open the file.
SAMPLES, SAMPLES_EACH = 1 << 16, 1 << 8

#: Counters of each kind of memory, in bytes: their names, and the field of a sample.
_COUNTERS = {
    "host": {"host memory": "host"},
    "device": {"device memory, allocated": "device_allocated", "device memory, reserved": "device_reserved"},
}


def trace_events(traces: Sequence[RankTrace]) -> list[Event]:
    """The events of all `traces`, of which there is at least one: metadata first, then the others by their time."""
    began = min(trace.started for trace in traces)
    limit = max(SAMPLES // len(traces), SAMPLES_EACH)
    ranks = [_Rank(trace, trace.started - began, _thinned(trace.samples, limit)) for trace in traces]
    metadata = [event for rank in ranks for event in rank.metadata()]
    return metadata + sorted((event for rank in ranks for event in rank.events()), key=lambda event: event["ts"])


def _thinned(samples: Sequence[MemorySample], limit: int) -> Sequence[MemorySample]:
    """Reduce samples to at most `limit`, with every peak."""
    history = History(limit=limit)
    for sample in samples:
        history.add(sample)
    return history.samples


@dataclass(frozen=True)
class _Rank:
    """The trace of one rank, which began `offset` seconds after the first, and the samples of it that are drawn."""

    trace: RankTrace
    offset: float
    samples: Sequence[MemorySample]

    def metadata(self) -> Iterator[Event]:
        rank = self.trace.rank
        yield self._event("M", "process_name", args={"name": f"rank {rank}"})
        yield self._event("M", "process_labels", args={"labels": self.trace.device})
        yield self._event("M", "process_sort_index", args={"sort_index": rank})
        for lane in sorted(set(self.trace.lanes())):
            yield self._event("M", "thread_name", tid=lane + 1, args={"name": "phases"})

    def events(self) -> Iterator[Event]:
        yield from self._phases()
        for kind in self.trace.kinds:
            for name, field in _COUNTERS[kind].items():
                yield from self._counter(name, field)
            yield from self._predictions(kind)
        if self.trace.error is not None:
            yield self._event("i", f"ended with {self.trace.error}", self.trace.seconds, s="p")

    def _phases(self) -> Iterator[Event]:
        for phase, lane in zip(self.trace.phases, self.trace.lanes(), strict=True):
            figures = dataclasses.asdict(phase)
            name, start, seconds, group = (figures.pop(key) for key in ("name", "start", "seconds", "group"))
            # From end to end, so that rounding makes no two of a lane overlap.
            took = self._microseconds(start + seconds) - self._microseconds(start)
            yield self._event("X", name, start, tid=lane + 1, dur=took, cat=group, args=figures)

    def _counter(self, name: str, field: str) -> Iterator[Event]:
        """The samples, without those that repeat the one before: a counter keeps its value until the next."""
        for value, run in itertools.groupby(self.samples, key=lambda sample: getattr(sample, field)):
            yield self._event("C", name, next(run).seconds, args={"bytes": value})

    def _predictions(self, kind: str) -> Iterator[Event]:
        """The predicted peak of each group of phases, with what was held before, while the group runs; then 0."""
        for group, prediction in self.trace.predictions.items():
            peak, extent = predicted_peak(prediction, kind), self.trace.extent(group)
            if peak is None or extent is None:
                continue
            for seconds, value in zip(extent, (peak, 0), strict=True):
                yield self._event("C", f"{kind} memory, predicted for {group}", seconds, args={"bytes": value})

    def _event(self, phase: str, name: str, seconds: float | None = None, *, tid: int = 0, **more: Any) -> Event:
        time = 0 if seconds is None else self._microseconds(seconds)
        return {"ph": phase, "name": name, "pid": self.trace.rank, "tid": tid, "ts": time, **more}

    def _microseconds(self, seconds: float) -> int:
        return round((self.offset + seconds) * 1e6)
