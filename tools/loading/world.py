"""This rank's place in the process group, and barriers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from surgery.comm.collectives import gather_objects

__all__ = ["World", "alone", "joined"]

#: Longest wait of a rank for another before it gives up: some take minutes to load a large model.
TIMEOUT = timedelta(minutes=8)

#: Longest wait of ranks for each other after a way has failed on one of them.
FAILURE_TIMEOUT = timedelta(seconds=90)

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank. `control_group` coordinates ranks, since a failing way may leave the default group out of step.

    None: this process is alone, and in no group.
    """

    rank: int
    size: int
    device: torch.device
    control_group: dist.ProcessGroup | None

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU, whose memory can be measured."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def meet(self) -> None:
        """Wait for all ranks and their devices."""
        self.synchronize()
        if self.control_group is not None:
            dist.all_reduce(torch.ones(1, device=self.device))
            self.synchronize()

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return any(gather_objects(value, self.control_group))

    def clear(self) -> None:
        """Release unused memory: of the device, of pinned pages, and of malloc's heap."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", lambda: None)()
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.reset_peak_host_memory_stats()
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def joined(device_type: str, *, memory_cap: float | None) -> Iterator[World]:
    """Join the process group that torchrun describes; device and group have been warmed up when the block begins.

    memory_cap: GiB that torch may use of a GPU.
    """
    device = _device(device_type, memory_cap)
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    world = World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        control_group=dist.new_group(backend="gloo", timeout=FAILURE_TIMEOUT),
    )
    world.meet()
    yield world
    dist.destroy_process_group()


@contextlib.contextmanager
def alone(device_type: str, *, memory_cap: float | None) -> Iterator[World]:
    """The only rank, without a process group; memory_cap as in `joined`."""
    yield World(rank=0, size=1, device=_device(device_type, memory_cap), control_group=None)


def _device(device_type: str, memory_cap: float | None) -> torch.device:
    """The device of this rank, which is torch's current one, under its cap."""
    if device_type != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if memory_cap is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_cap * GIB / total, device)
    return device
