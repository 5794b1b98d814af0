"""The file of a rank: read as it was written, and refused if anything in it is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from surgery.telemetry.measurements import Prediction
from surgery.tracing.record import RankTrace
from tests.surgery.tracing.made import trace_of


@pytest.mark.parametrize(
    "trace",
    [
        trace_of(),
        trace_of(2, 4, error="KeyboardInterrupt", samples=(), phases=(), predictions={}),
        trace_of(predictions={"train": Prediction(device=5)}),
        trace_of(read_once_per_node={"h.*.c_attn.weight": 12}),
        trace_of(device="\ud800 </script> \0"),
    ],
)
def test_round_trip(trace: RankTrace) -> None:
    assert RankTrace.from_json(trace.as_json()) == trace


def test_a_file_from_before_it_was_noted_says_nothing_of_what_is_read_once_per_node() -> None:
    values = json.loads(trace_of(read_once_per_node={"h.*.c_attn.weight": 12}).as_json())
    del values["read_once_per_node"]
    assert RankTrace.from_json(json.dumps(values)) == trace_of()


def test_samples_are_columns() -> None:
    columns = json.loads(trace_of().as_json())["samples"]
    assert columns["seconds"] == [0.0, 1.0, 2.0, 2.5]
    assert set(columns) == {"seconds", "host", "device_allocated", "device_reserved"}


Damage = Callable[[dict[str, Any]], object]

DAMAGED: list[tuple[Damage, str]] = [
    (lambda d: d.pop("format"), "some other JSON"),
    (lambda d: d.update(format="tensorboard"), "some other JSON"),
    (lambda d: d.update(version=2), "expected version 1, found 2; read it with the release that wrote it"),
    (lambda d: d.pop("rank"), r"expected the field\(s\) rank, found none"),
    (lambda d: d.update(rank="0"), "expected rank to be a whole number, 0 or more, found '0'"),
    (lambda d: d.update(rank=True), "expected rank to be"),
    (lambda d: d.update(rank=-1), "expected rank to be"),
    (lambda d: d.update(rank=1), "expected a rank below the world size of 1, found 1"),
    (lambda d: d.update(seconds=float("nan")), "expected seconds to be a number, 0 or more, found nan"),
    (lambda d: d.update(seconds=10**400), "expected seconds to be"),
    (lambda d: d.update(started=1e15), "before the year 10000"),
    (lambda d: d.update(error=7), "expected error to be text or null, found 7"),
    (lambda d: d.update(phases={}), "expected phases to be a list, found dict"),
    (lambda d: d["phases"].append(3), "expected an object, found int"),
    (lambda d: d["phases"][0].update(host_peak=1.5), "expected host_peak to be a whole number"),
    (lambda d: d["phases"][0].pop("name"), r"expected the field\(s\) name, found none"),
    (lambda d: d.update(predictions=[]), "expected an object, found list"),
    (lambda d: d["predictions"]["load"].update(host="much"), "expected host to be a whole number, 0 or more, or null"),
    (lambda d: d.update(read_once_per_node=["weight"]), "expected an object, found list"),
    (lambda d: d.update(read_once_per_node={"weight": "2"}), "expected a count of read_once_per_node to be a whole"),
    (lambda d: d["samples"].pop("host"), "expected host to be a list, found NoneType"),
    (lambda d: d["samples"]["host"].pop(), "expected samples in columns of one length"),
    (lambda d: d["samples"]["host"].__setitem__(0, None), "expected a sample to be a whole number"),
    (lambda d: d["samples"]["seconds"].reverse(), "expected samples in order of time"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGED)
def test_a_field_that_is_wrong_is_named(damage: Damage, says: str) -> None:
    values = json.loads(trace_of().as_json())
    damage(values)
    with pytest.raises(ValueError, match=says):
        RankTrace.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[1]", "null", '"surgery-trace"', "[" * 100_000, trace_of().as_json()[:200]])
def test_what_is_no_trace_at_all(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the message is json's in most cases
        RankTrace.from_json(text)
