"""What one rank leaves behind: its measurements as JSON, and read again with every field checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, TypeVar, get_type_hints

from surgery.telemetry.measurements import Phase, Prediction, Sample

__all__ = ["FORMAT", "VERSION", "RankTrace"]

#: What tells a trace from other JSON. The version grows when a field changes its meaning, or is needed and new.
FORMAT = "surgery-trace"
VERSION = 1

#: By the annotation of a field: how an error names it, and what `json` makes of it.
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

T = TypeVar("T")


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
    samples: tuple[Sample, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON's types only; samples as columns."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        columns = zip(*self.samples, strict=True) if self.samples else ((),) * len(Sample._fields)
        return {
            "format": FORMAT,
            "version": VERSION,
            **fields,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "predictions": {group: dataclasses.asdict(each) for group, each in self.predictions.items()},
            "samples": dict(zip(Sample._fields, map(list, columns), strict=True)),
        }

    def as_json(self) -> str:
        """One line."""
        return json.dumps(self.as_dict(), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RankTrace:
        """What `as_json` gave; raises `ValueError` saying what is wrong with any other text."""
        try:
            found = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        values = _of_this_version(found)
        trace = _read(
            cls,
            {
                **values,
                "phases": tuple(_read(Phase, each) for each in _list(values, "phases")),
                "predictions": {
                    group: _read(Prediction, each) for group, each in _dict(values.get("predictions")).items()
                },
                "read_once_per_node": _counts(values.get("read_once_per_node", {})),
                "samples": tuple(_samples(_dict(values.get("samples")))),
            },
        )
        if trace.rank >= trace.world_size:
            raise ValueError(f"expected a rank below the world size of {trace.world_size}, found {trace.rank}")
        if trace.started >= _YEAR_10000:
            raise ValueError(f"expected a time before the year 10000, found {trace.started} seconds since 1970")
        return trace


def _of_this_version(found: object) -> dict[str, Any]:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"expected an object whose format is {FORMAT!r}; this is some other JSON")
    if found.get("version") != VERSION:
        raise ValueError(
            f"expected version {VERSION}, found {found.get('version')!r}; read it with the release that wrote it"
        )
    return found


def _counts(found: object) -> dict[str, int]:
    counts = _dict(found)
    for count in counts.values():
        _check("a count of read_once_per_node", count, int)
    return counts


def _samples(columns: Mapping[str, Any]) -> Iterable[Sample]:
    lists = [_list(columns, name) for name in Sample._fields]
    if len({*map(len, lists)}) > 1:
        raise ValueError(f"expected samples in columns of one length, found {[*map(len, lists)]}")
    seconds, *_ = lists
    for column, kind in zip(lists, get_type_hints(Sample).values(), strict=True):
        for value in column:
            _check("a sample", value, kind)
    if sorted(seconds) != seconds:
        raise ValueError("expected samples in order of time")
    return map(Sample._make, zip(*lists, strict=True))


def _read(kind: type[T], found: object) -> T:
    """`kind`, a dataclass, made from an object; every field of a plain type is checked, and needed if not defaulted."""
    values = _dict(found)
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # is a dataclass
    missing = fields.keys() - values.keys()
    if missing:
        raise ValueError(f"expected the field(s) {', '.join(sorted(missing))}, found none")
    for name in fields:
        _check(name, values[name], hints[name])
    return kind(**{name: values[name] for name in fields})


def _check(name: str, value: object, hint: object) -> None:
    """Raise `ValueError` unless `value` is of the plain type that `hint` is; other hints are left to others."""
    expected, kinds = _EXPECTED.get(hint, ("anything", (object,)))
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if fits and isinstance(value, (int, float)):
        fits = 0 <= value < _TOO_MUCH
    if not fits:
        raise ValueError(f"expected {name} to be {expected}, found {value!r:.40}")


def _dict(found: object) -> dict[str, Any]:
    if isinstance(found, dict):
        return found
    raise ValueError(f"expected an object, found {type(found).__name__}")


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    if isinstance(found, list):
        return found
    raise ValueError(f"expected {name} to be a list, found {type(found).__name__}")
