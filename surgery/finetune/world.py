"""The ranks of a job: joining them, and leaving without hanging when one has failed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from surgery.comm.environment import expect_number, local_rank
from surgery.comm.failures import collective
from surgery.comm.heartbeat import beating, wait_for_the_others
from surgery.comm.ranks import Ranks, current_ranks, store_holder
from surgery.errors import ConfigError

__all__ = ["World", "join_world"]

_LAUNCH = "start several ranks with: torchrun --nproc-per-node N -m surgery finetune ..."


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers, and the device that it works on. ranks: by which they stop together."""

    ranks: Ranks
    device: torch.device

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.ranks.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self.rank == 0


@contextmanager
def join_world(*, timeout: timedelta) -> Iterator[World]:
    """The world that torchrun describes in the environment, or a world of one.

    With more than one rank the default process group is initialised (NCCL with a GPU, gloo without) and left at the end
    of the block, or aborted if it raises, since peers may wait in a collective that this rank will never join. One that
    the caller has initialised is used and kept. `timeout` bounds every collective. Raises `ConfigError` if the
    environment is incomplete or there are fewer GPUs than ranks; `PeerError` once another rank has ended.
    """
    with _joined(timeout) as world, beating(world.ranks), collective(world.ranks):
        yield world


@contextmanager
def _joined(timeout: timedelta) -> Iterator[World]:
    if dist.is_initialized():
        found = local_rank()
        yield World(ranks=current_ranks(), device=_device(dist.get_rank() if found is None else found))
        return
    size = 1 if "WORLD_SIZE" not in os.environ else expect_number("WORLD_SIZE", least=1, advice=_LAUNCH)
    if size == 1:
        yield World(ranks=current_ranks(), device=_device(0))
        return
    expect_number("RANK", least=0, advice=_LAUNCH)
    device = _device(expect_number("LOCAL_RANK", least=0, advice=_LAUNCH))
    is_cuda = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if is_cuda else None)
    except (ValueError, dist.DistError) as error:
        raise ConfigError(f"expected {size} ranks to form a process group, found: {error}; {_LAUNCH}") from error
    world = World(ranks=current_ranks(), device=device)
    try:
        yield world
    except BaseException:
        _abort()
        if world.rank == store_holder(world.ranks.store):
            wait_for_the_others(world.ranks)
        raise
    dist.destroy_process_group()


def _device(number: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {number} has no GPU: expected at least {number + 1}, found "
            f"{torch.cuda.device_count()}; start as many ranks on this node as it has GPUs"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _abort() -> None:
    # Destroying an NCCL group waits for the kernels in flight, and those wait for a rank that is gone.
    if torch.cuda.is_available():
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
