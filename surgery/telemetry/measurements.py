"""What is measured while a model is built and trained: phases, samples of memory, and what was predicted of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["History", "Phase", "Prediction", "Sample"]

#: Samples that a history keeps at most: a picture has about a thousand columns.
SAMPLES = 4096


@dataclass(kw_only=True)
class Phase:
    """One phase, in bytes and seconds. Host memory is anonymous memory, device memory what torch has allocated.

    group: what a prediction is made for: `load`, `train`.
    start: seconds after the report began.
    bytes_read: from checkpoints, by every thread, while the phase ran.
    """

    name: str
    group: str = "load"
    start: float = 0.0
    seconds: float = 0.0
    bytes_read: int = 0
    host_before: int = 0
    host_peak: int = 0
    device_peak: int = 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Peaks, in bytes, that a plan expects of a group of phases, above what was held when it was made.

    None where the plan says nothing. `host_before` and `device_before` are what was held.
    """

    host: int | None = None
    device: int | None = None
    host_before: int = 0
    device_before: int = 0


class Sample(NamedTuple):
    """The most memory seen from `seconds` on until the next sample, in bytes; on the device 0 without one."""

    seconds: float
    host: int
    device_allocated: int = 0
    device_reserved: int = 0


@dataclass(kw_only=True)
class History:
    """Samples of memory in order of time, never more than `limit` (2 or more).

    When it is full, neighbours are joined in pairs, and from then on twice as many samples make one. Each keeps the
    maxima of those that it stands for, so that no peak is lost, however long a run is.
    """

    limit: int = SAMPLES
    samples: list[Sample] = field(default_factory=list)
    _width: int = field(default=1, init=False, repr=False)
    _joined: int = field(default=0, init=False, repr=False)

    def add(self, sample: Sample) -> None:
        """Append `sample`, or join it to the last one."""
        if self._joined:
            self.samples[-1] = _join(self.samples[-1], sample)
        else:
            self._make_room()
            self.samples.append(sample)
        self._joined = (self._joined + 1) % self._width

    def _make_room(self) -> None:
        if len(self.samples) < self.limit:
            return
        kept = self.samples
        self.samples = [_join(first, second) for first, second in zip(kept[::2], kept[1::2], strict=False)]
        self.samples += kept[len(kept) & ~1 :]  # of an odd number, one is left over
        self._width *= 2


def _join(first: Sample, second: Sample) -> Sample:
    return Sample(first.seconds, *map(max, first[1:], second[1:]))
