"""The job of this rank, and its communication with the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from surgery.comm.collectives import gather_objects

__all__ = ["Job", "Ranks", "joined"]

#: Longest wait of a rank for another before it gives up. Rank 0 computes the reference before it joins.
TIMEOUT = timedelta(minutes=4)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job of one rank. work: a folder shared by all ranks. small: tiny models only, for machines without a GPU."""

    rank: int
    world: int
    device: torch.device
    work: Path
    small: bool

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU, whose memory can be measured."""
        return self.device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All ranks, over a separate process group, since a failed part may leave the device's group out of step."""

    group: dist.ProcessGroup

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank."""
        return gather_objects(value, self.group)


@contextlib.contextmanager
def joined(job: Job) -> Iterator[Ranks]:
    """Initialize the process group of the device for the block."""
    device = job.device if job.on_cuda else None
    dist.init_process_group("nccl" if job.on_cuda else "gloo", timeout=TIMEOUT, device_id=device)
    try:
        yield Ranks(group=dist.new_group(backend="gloo", timeout=TIMEOUT))
    finally:
        dist.destroy_process_group()
