"""Record a block of work on this rank, and leave its trace in a folder when the block ends, however it does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from surgery.comm.environment import compute_device, launched_rank, launched_world_size
from surgery.errors import ConfigError, TraceError
from surgery.telemetry.report import Report
from surgery.tracing.folder import start_afresh, write_rank
from surgery.tracing.record import RankTrace

__all__ = ["trace"]


@contextmanager
def trace(folder: str | os.PathLike[str], *, device: torch.device | None = None) -> Iterator[Report]:
    """Record memory over time while the block runs; what it yields is given to `qlora` as its `report`.

    Each rank writes `folder/rank-00000.json` when its block ends, also when that is by an exception, whose type is then
    in the file. Rank 0 draws `folder/trace.html` and joins `folder/trace.json`, which https://ui.perfetto.dev opens,
    from the files that are there; so does the rank that is the last to end, if all write to the same file system. Ranks
    do not wait for each other: `surgery trace` draws again from what was collected later. An earlier trace in `folder`
    is replaced.

    Args:
        folder: made if it is not there.
        device: whose memory is recorded; None means this rank's accelerator, or the CPU.

    Raises:
        TraceError: the folder cannot be written; or, at the end of a block that did not raise, a file in it is broken.
        ConfigError: RANK or WORLD_SIZE are set, but make no sense.
    """
    place = Path(folder)
    rank, world_size = _rank_and_world()
    start_afresh(place, rank=rank, world_size=world_size)
    report = Report(show_progress=rank == 0, device=compute_device(device))
    started = time.time() - report.seconds

    def result(error: BaseException | None = None) -> RankTrace:
        return RankTrace(
            rank=rank,
            world_size=world_size,
            device=_name(report.device),
            started=started,
            seconds=report.seconds,
            bytes_read=report.bytes_read,
            error=None if error is None else type(error).__name__,
            phases=tuple(sorted(report.phases, key=lambda phase: phase.start)),
            predictions=dict(report.predictions),
            read_once_per_node=dict(report.read_once_per_node),
            samples=tuple(report.history.samples),
        )

    try:
        with report.recording():
            yield report
    except BaseException as error:
        try:
            write_rank(result(error), place)
        except TraceError as failure:
            error.add_note(f"Nor is there a trace of it: {failure}")
        raise
    write_rank(result(), place)


def _rank_and_world() -> tuple[int, int]:
    """Rank and world size, of the process group, or of the one that the launcher says is still to be made."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, world_size = launched_rank() or 0, launched_world_size()
    if world_size is None:
        world_size = 1
    if rank >= world_size:
        raise ConfigError(
            f"expected RANK to be a number below WORLD_SIZE, found RANK='{rank}' and WORLD_SIZE='{world_size}'; "
            "correct or unset both"
        )
    return rank, world_size


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
