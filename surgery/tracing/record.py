"""The trace of one rank: its measurements as JSON, and read again with every field checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from surgery.telemetry.measurements import MemorySample, Phase, Prediction

__all__ = ["FORMAT", "KINDS", "VERSION", "RankTrace", "predicted_peak"]

#: Kinds of memory: phases have `host_peak`, predictions `host` and `host_before`; the same for the device.
KINDS = ("host", "device")

#: The mark of a trace in JSON. The version grows when a field changes its meaning, or is needed and new.
FORMAT = "surgery-trace"
VERSION = 1

#: By the annotation of a field: its name in an error, and the types that `json` makes of it.
_EXPECTED: Mapping[object, tuple[str, tuple[type, ...]]] = {
    str: ("text", (str,)),
    str | None: ("text or null", (str, NoneType)),
    int: ("a whole number, 0 or more", (int,)),
    int | None: ("a whole number, 0 or more, or null", (int, NoneType)),
    float: ("a number, 0 or more", (int, float)),
}

#: No count of bytes or seconds comes near, and whatever is below can be drawn. Infinity and NaN are not.
_TOO_MUCH = 2**63

_YEAR_10000 = 253_402_300_800


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """The trace of one rank, of `seconds` from `started` (seconds since 1970, UTC) on.

    device: its name, for people. error: the type of the exception that ended the block, if one did.
    phases: in the order in which they began. samples: in order of time. predictions: by group of phases.
    read_once_per_node: as the report has it; nothing in a file of an older release.
    """

    rank: int
    world_size: int
    device: str
    started: float
    seconds: float
    bytes_read: int
    error: str | None = None
    phases: tuple[Phase, ...] = ()
    predictions: Mapping[str, Prediction]
    read_once_per_node: Mapping[str, int] = field(default_factory=dict)
    samples: tuple[MemorySample, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of memory to show: the device's if it has held anything, or should have."""
        held = any(sample.device_allocated or sample.device_reserved for sample in self.samples)
        peaks = any(phase.device_peak for phase in self.phases)
        return KINDS if held or peaks or any(each.device for each in self.predictions.values()) else KINDS[:1]

    def extent(self, group: str) -> tuple[float, float] | None:
        """Seconds at which the first phase of `group` began and its last ended; None if there was none."""
        found = [phase for phase in self.phases if phase.group == group]
        if not found:
            return None
        return min(phase.start for phase in found), max(phase.start + phase.seconds for phase in found)

    def lanes(self) -> list[int]:
        """A lane for each phase, from 0, so that no two in a lane overlap."""
        ends: list[float] = []
        found = []
        for phase in self.phases:
            free = next((lane for lane, end in enumerate(ends) if end <= phase.start), len(ends))
            ends[free : free + 1] = [phase.start + phase.seconds]
            found.append(free)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The trace in JSON's types; samples as columns."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        columns = zip(*self.samples, strict=True) if self.samples else ((),) * len(MemorySample._fields)
        return {
            "format": FORMAT,
            "version": VERSION,
            **fields,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "predictions": {group: dataclasses.asdict(each) for group, each in self.predictions.items()},
            "samples": dict(zip(MemorySample._fields, map(list, columns), strict=True)),
        }

    def as_json(self) -> str:
        """The trace as one line of JSON."""
        return json.dumps(self.as_dict(), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RankTrace:
        """Parse what `as_json` gave. Raises `ValueError`, saying what is wrong, for any other text."""
        try:
            found = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected an object whose format is {FORMAT!r}; this is some other JSON")
        if found.get("version") != VERSION:
            raise ValueError(
                f"expected version {VERSION}, found {found.get('version')!r}; read it with the release that wrote it"
            )
        trace: RankTrace = _read(cls, {"read_once_per_node": {}, **found}, "trace")
        if trace.rank >= trace.world_size:
            raise ValueError(f"expected a rank below the world size of {trace.world_size}, found {trace.rank}")
        if trace.started >= _YEAR_10000:
            raise ValueError(f"expected a time before the year 10000, found {trace.started} seconds since 1970")
        return trace


def predicted_peak(prediction: Prediction, kind: str) -> int | None:
    """Bytes of `kind` that a plan expects at the peak, with what was held before; None if it expects nothing."""
    above: int | None = getattr(prediction, kind)
    return None if above is None else above + int(getattr(prediction, f"{kind}_before"))


def _read(hint: Any, found: object, name: str) -> Any:
    """Make what `hint` says from JSON's types. Raises `ValueError`, naming the field that is missing or wrong."""
    if hint in _EXPECTED:
        return _plain(hint, found, name)
    if hint == tuple[MemorySample, ...]:
        return _samples(_dict(found))
    if get_origin(hint) is tuple:
        return tuple(_read(get_args(hint)[0], each, name) for each in _list(found, name))
    values = _dict(found)
    if get_origin(hint) is Mapping:
        return {key: _read(get_args(hint)[1], each, f"a count of {name}") for key, each in values.items()}
    fields = get_type_hints(hint)
    if missing := fields.keys() - values.keys():
        raise ValueError(f"expected the field(s) {', '.join(sorted(missing))}, found none")
    return hint(**{key: _read(kind, values[key], key) for key, kind in fields.items()})


def _plain(hint: Any, found: object, name: str) -> object:
    expected, kinds = _EXPECTED[hint]
    fits = isinstance(found, kinds) and not isinstance(found, bool)
    if fits and isinstance(found, (int, float)):
        fits = 0 <= found < _TOO_MUCH
    if not fits:
        raise ValueError(f"expected {name} to be {expected}, found {found!r:.40}")
    return found


def _samples(columns: Mapping[str, object]) -> tuple[MemorySample, ...]:
    lists = [_list(columns.get(name), name) for name in MemorySample._fields]
    if len({*map(len, lists)}) > 1:
        raise ValueError(f"expected samples in columns of one length, found {[*map(len, lists)]}")
    for column, kind in zip(lists, get_type_hints(MemorySample).values(), strict=True):
        for value in column:
            _plain(kind, value, "a sample")
    if sorted(lists[0]) != lists[0]:
        raise ValueError("expected samples in order of time")
    return tuple(map(MemorySample._make, zip(*lists, strict=True)))


def _dict(found: object) -> dict[str, Any]:
    if isinstance(found, dict):
        return found
    raise ValueError(f"expected an object, found {type(found).__name__}")


def _list(found: object, name: str) -> list[Any]:
    if isinstance(found, list):
        return found
    raise ValueError(f"expected {name} to be a list, found {type(found).__name__}")
