"""The kinds of memory that are shown: the host's, and the device's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from surgery.telemetry.measurements import Phase, Prediction, Sample
from surgery.tracing.record import RankTrace

__all__ = ["DEVICE", "HOST", "Kind", "measured_peak", "values_of"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of memory: how it is found in samples, phases and predictions."""

    name: str
    title: str
    series: Mapping[str, Callable[[Sample], int]]
    peak: Callable[[Phase], int]
    predicted: Callable[[Prediction], int | None]
    before: Callable[[Prediction], int]


HOST = Kind(
    name="host",
    title="host, anonymous",
    series={"line": lambda sample: sample.host},
    peak=lambda phase: phase.host_peak,
    predicted=lambda prediction: prediction.host,
    before=lambda prediction: prediction.host_before,
)
DEVICE = Kind(
    name="device",
    title="device, allocated; thin: reserved",
    series={"thin": lambda sample: sample.device_reserved, "line": lambda sample: sample.device_allocated},
    peak=lambda phase: phase.device_peak,
    predicted=lambda prediction: prediction.device,
    before=lambda prediction: prediction.device_before,
)


def measured_peak(trace: RankTrace, group: str, kind: Kind) -> int | None:
    """The peak over the phases of `group`, above what was held when it was predicted; None if there was none."""
    peaks = [kind.peak(phase) for phase in trace.phases if phase.group == group]
    return max(max(peaks) - kind.before(trace.predictions[group]), 0) if peaks else None


def values_of(trace: RankTrace, kind: Kind) -> Iterable[int]:
    """Everything that a chart of `kind` shows."""
    for series in kind.series.values():
        yield from map(series, trace.samples)
    yield from map(kind.peak, trace.phases)
    for prediction in trace.predictions.values():
        if (predicted := kind.predicted(prediction)) is not None:
            yield kind.before(prediction) + predicted
