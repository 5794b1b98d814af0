"""`surgery.trace`: files left by a block that ends well, or not, in one process and on several ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import surgery
from surgery.errors import ConfigError, TraceError
from surgery.telemetry.measurements import Phase
from surgery.tracing.folder import read_ranks
from surgery.tracing.record import RankTrace
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks, try_ranks
from tests.surgery.tracing.made import MIB, Page, look, pages

BUILDING = {"skeleton", "install", "shard"}


def phase_named(trace: RankTrace, name: str) -> Phase:
    return next(phase for phase in trace.phases if phase.name == name)


def test_one_process(tmp_path: Path) -> None:
    before = time.time()
    with surgery.trace(tmp_path / "new" / "trace") as report:
        report.predict("load", host=64 * MIB)
        with report.phase("hold"):
            held = pages(64 * MIB)
            report.count_bytes(1234)
            look(report.history)
        del held
        look(report.history)
    (trace,) = read_ranks(tmp_path / "new" / "trace")
    assert (trace.rank, trace.world_size, trace.error, trace.bytes_read) == (0, 1, None, 1234)
    assert before <= trace.started <= trace.started + trace.seconds <= time.time() + 0.01
    hold = phase_named(trace, "hold")
    assert hold.host_peak - hold.host_before >= 64 * MIB
    assert max(sample.host for sample in trace.samples) >= hold.host_before + 64 * MIB
    assert trace.samples[-1].host < hold.host_before + 8 * MIB
    ((_, _, predicted, measured, ratio),) = Page.read(tmp_path / "new" / "trace" / "trace.html").rows("of-predictions")[
        0
    ]
    assert int(predicted) == 64 * MIB
    assert ratio == f"{int(measured) / int(predicted):.2f}"
    assert 0.99 <= float(ratio) <= 1.15


def fail(folder: Path, error: type[BaseException]) -> None:
    with surgery.trace(folder) as report:
        report.count_bytes(5)
        with report.phase("load"):
            raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_its_trace(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(tmp_path, error)
    (trace,) = read_ranks(tmp_path)
    assert trace.error == error.__name__
    assert [phase.name for phase in trace.phases] == ["load"]
    assert trace.bytes_read == 5
    assert f"Rank 0 ended with {error.__name__}." in (tmp_path / "trace.html").read_text()


def fail_without_a_folder(folder: Path) -> None:
    with surgery.trace(folder):
        folder.rmdir()
        raise ZeroDivisionError


def test_the_error_of_the_block_is_not_lost_to_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    with pytest.raises(ZeroDivisionError) as caught:
        fail_without_a_folder(folder)
    assert caught.value.__notes__[0].startswith(f"Nor is there a trace of it: the trace cannot be written to {folder}")


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    with pytest.raises(TraceError, match="cannot be written"), surgery.trace(folder):
        folder.rmdir()
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match="cannot be written"), surgery.trace(tmp_path / "file"):
        pytest.fail("the block must not run")


def test_a_launcher_that_makes_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK to be a number below WORLD_SIZE, found RANK='2' and WORLD_SIZE='2'"):
        surgery.trace(tmp_path).__enter__()


def build(checkpoint: Path, folder: Path) -> dict[str, dict[str, float]]:
    with (
        surgery.trace(folder) as report,
        surgery.qlora(checkpoint, shard=surgery.FSDP1(), dtype=torch.float32, report=report),
    ):
        report.count_bytes(1000 + dist.get_rank())
    return report.as_dict()


@pytest.mark.distributed
def test_ranks_leave_what_their_reports_say(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    reports = run_ranks(build, 2, model, tmp_path / "trace")
    traces = read_ranks(tmp_path / "trace")
    assert [trace.rank for trace in traces] == [0, 1]
    for rank, (trace, report) in enumerate(zip(traces, reports, strict=True)):
        assert report.keys() >= BUILDING
        for name, figures in report.items():  # a phase of several turns has the highest peak of them
            assert figures["host_peak"] == max(phase.host_peak for phase in trace.phases if phase.name == name)
        assert trace.bytes_read - sum(phase.bytes_read for phase in trace.phases) >= 1000 + rank  # told after them
        ended = max(phase.start + phase.seconds for phase in trace.phases)
        assert trace.samples[0].seconds <= trace.phases[0].start
        assert ended <= trace.samples[-1].seconds + 0.01 <= trace.seconds + 0.02
    assert sum(trace.bytes_read for trace in traces) - 2001 >= surgery.Checkpoint.open(model).index.total_bytes
    page = Page.read(tmp_path / "trace" / "trace.html")
    for table, trace in zip(page.rows("of-phases"), traces, strict=True):
        assert [row[0] for row in table] == [phase.name for phase in trace.phases]


def fail_on_one(checkpoint: Path, folder: Path) -> None:
    with surgery.trace(folder) as report:
        source = checkpoint if dist.get_rank() == 0 else checkpoint.with_name("nowhere")
        surgery.qlora(source, shard=surgery.FSDP1(), report=report)


@pytest.mark.distributed
def test_ranks_that_fail_say_with_what(tmp_path: Path) -> None:
    outcomes = try_ranks(fail_on_one, 2, save_tiny(tmp_path / "model"), tmp_path / "trace")
    assert all(outcome.failure for outcome in outcomes)
    assert [trace.error for trace in read_ranks(tmp_path / "trace")] == ["PeerError", "CheckpointError"]
    joined = json.loads((tmp_path / "trace" / "trace.json").read_text())
    assert [rank["error"] for rank in joined["ranks"]] == ["PeerError", "CheckpointError"]
