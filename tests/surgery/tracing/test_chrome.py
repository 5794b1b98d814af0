"""Chrome's trace format: exactly these events, which a viewer can place, in order of time."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from surgery.telemetry.measurements import MemorySample, Phase, Prediction
from surgery.tracing.chrome import trace_events
from surgery.tracing.folder import write_rank
from tests.surgery.tracing.made import MIB, trace_of


def metadata(name: str, tid: int, /, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": 0, "tid": tid, "ts": 0, "args": args}


def phase(name: str, ts: int, dur: int, tid: int, cat: str = "load", **args: int) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur, "cat": cat, "args": args}


def counter(name: str, ts: int, count: int) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": 0, "tid": 0, "ts": ts, "args": {"bytes": count}}


def test_one_rank_exactly() -> None:
    none = {"bytes_read": 0, "device_peak": 0}
    before, peak = 80 * MIB, 150 * MIB
    assert trace_events([trace_of()]) == [
        metadata("process_name", 0, name="rank 0"),
        metadata("process_labels", 0, labels="cpu"),
        metadata("process_sort_index", 0, sort_index=0),
        metadata("thread_name", 1, name="phases"),
        metadata("thread_name", 2, name="phases"),
        phase("load", 0, 2_000_000, 1, **none | {"bytes_read": 4_000_000}, host_before=before, host_peak=peak),
        counter("host memory", 0, 80 * MIB),
        counter("host memory, predicted for load", 0, 130 * MIB),
        phase("adapt", 1_000_000, 500_000, 2, **none, host_before=90 * MIB, host_peak=peak),
        counter("host memory", 1_000_000, 150 * MIB),
        phase("train", 2_000_000, 1_000_000, 1, "train", **none, host_before=100 * MIB, host_peak=200 * MIB),
        counter("host memory", 2_000_000, 120 * MIB),
        counter("host memory, predicted for load", 2_000_000, 0),
        counter("host memory", 2_500_000, 200 * MIB),
    ]


def test_a_device_has_counters_of_what_is_allocated_and_reserved() -> None:
    samples = (MemorySample(0.0, 1, 5, 9), MemorySample(0.25, 1, 5, 10), MemorySample(0.5, 2, 4, 10))
    trace = trace_of(phases=(), samples=samples, predictions={})
    assert [event for event in trace_events([trace]) if event["ph"] == "C"] == [
        counter("host memory", 0, 1),
        counter("device memory, allocated", 0, 5),
        counter("device memory, reserved", 0, 9),
        counter("device memory, reserved", 250_000, 10),
        counter("host memory", 500_000, 2),
        counter("device memory, allocated", 500_000, 4),
    ]


def test_a_device_that_holds_nothing_but_should_is_shown() -> None:
    predicted = trace_of(predictions={"train": Prediction(device=8, device_before=1)})
    counted = [(event["name"], event["ts"], event["args"]) for event in trace_events([predicted]) if event["ph"] == "C"]
    assert ("device memory, allocated", 0, {"bytes": 0}) in counted
    assert ("device memory, predicted for train", 2_000_000, {"bytes": 9}) in counted
    assert ("device memory, predicted for train", 3_000_000, {"bytes": 0}) in counted


def test_ranks_are_processes_on_one_clock() -> None:
    events = trace_events([trace_of(1, 3, error="KeyboardInterrupt"), trace_of(2, 3)])  # rank 2 begins a second later
    assert all({"ph", "name", "pid", "tid", "ts"} <= event.keys() for event in events)
    assert all(type(event["ts"]) is int and event["ts"] >= 0 for event in events)
    kinds = [event["ph"] for event in events]
    assert kinds.count("M") == kinds.index("X"), "metadata first"
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    loads = {event["pid"]: event["ts"] for event in events if event["ph"] == "X" and event["name"] == "load"}
    assert loads == {1: 0, 2: 1_000_000}
    (ended,) = (event for event in events if event["ph"] == "i")
    assert ended == {"ph": "i", "name": "ended with KeyboardInterrupt", "pid": 1, "tid": 0, "ts": 3_000_000, "s": "p"}


def test_counters_of_many_ranks_are_thinned_and_keep_their_peaks() -> None:
    samples = tuple(
        MemorySample(float(second), 100 + second % 7 + (900 if second == 777 else 0)) for second in range(1000)
    )
    many = [trace_of(rank, 128, samples=samples) for rank in range(128)]
    counted = [event for event in trace_events(many) if event["name"] == "host memory"]
    for rank in range(128):
        values = [event["args"]["bytes"] for event in counted if event["pid"] == rank]
        assert len(values) <= 512
        assert max(values) == samples[777].host
    assert len([event for event in trace_events(many[:1]) if event["name"] == "host memory"]) == 1000


def test_phases_of_a_lane_do_not_overlap_by_rounding() -> None:
    phases, start = [], 0.0
    for number in range(1000):
        phases.append(Phase(name=str(number), start=start, seconds=1.3e-6))
        start += 1.3e-6
    events = [event for event in trace_events([trace_of(phases=tuple(phases))]) if event["ph"] == "X"]
    for first, second in pairwise(events):
        assert first["tid"] == second["tid"] == 1
        assert first["ts"] + first["dur"] <= second["ts"]


def test_the_joined_file_begins_with_the_events(tmp_path: Path) -> None:
    write_rank(trace_of(device="\ud800 </script> \0"), tmp_path)
    text = (tmp_path / "trace.json").read_text()
    assert text.startswith('{"traceEvents":[{"ph":"M"'), "by which viewers know the format"
    joined = json.loads(text)
    assert joined["traceEvents"] == trace_events([trace_of(device="\ud800 </script> \0")])
    assert list(joined) == ["traceEvents", "world_size", "ranks"]
