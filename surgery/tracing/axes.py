"""What the charts of all ranks share, so that they can be compared by eye: time, memory, colours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.tracing.kinds import DEVICE, HOST, Kind, values_of
from surgery.tracing.record import RankTrace

__all__ = ["COLOURS", "Axes", "Range"]

#: Colours that phases are given in turn; the style sheet has them.
COLOURS = 8

#: Below this share of the highest value, an axis begins at 0; above, close to the lowest, or nothing would be seen.
FLAT = 0.5

#: What is left free above the highest value, and below the lowest, of what lies between them.
ROOM = 0.08


@dataclass(frozen=True)
class Range:
    """An interval of bytes or seconds; never empty."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float]) -> Range:
        """Of an axis that shows all `values`, with a little room."""
        found = list(values) or [0.0]
        low, high = min(found), max(found)
        if low <= FLAT * high:
            low = 0.0
        room = ROOM * (high - low) or 1.0
        return cls(max(low - room, 0.0) if low else 0.0, high + room)

    def share(self, value: float) -> float:
        """Where `value` is: 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Seconds since the first rank began; bytes of each kind of memory that is shown; phases -> colours.

    kinds: of memory: the device's if any rank has held, or should have held, anything there.
    """

    began: float
    seconds: Range
    kinds: tuple[Kind, ...]
    memory: Mapping[str, Range]
    colours: Mapping[str, int]

    @classmethod
    def of(cls, traces: Sequence[RankTrace]) -> Axes:
        """That hold everything in `traces`, of which there is at least one."""
        began = min(trace.started for trace in traces)
        longest = max(trace.started - began + trace.seconds for trace in traces)
        names = dict.fromkeys(phase.name for trace in traces for phase in trace.phases)
        values = {kind.name: [value for trace in traces for value in values_of(trace, kind)] for kind in (HOST, DEVICE)}
        return cls(
            began=began,
            seconds=Range(0.0, longest or 1.0),
            kinds=(HOST, DEVICE) if any(values[DEVICE.name]) else (HOST,),
            memory={name: Range.around(found) for name, found in values.items()},
            colours=dict(zip(names, itertools.cycle(range(COLOURS)), strict=False)),
        )
