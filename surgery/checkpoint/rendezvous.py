"""Do something once per node while the other ranks of the node wait, so that all succeed or all fail.

Without a process group, or in a group of one, there is nobody to wait for and nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from surgery.comm.collectives import gather_objects
from surgery.comm.environment import local_rank
from surgery.errors import CheckpointError

__all__ = ["Rendezvous", "is_node_leader", "rendezvous"]

T = TypeVar("T")

# How long the other ranks wait for a download. The groups that training uses give up after 10 or 30 minutes,
# and a large checkpoint can take longer. A rank that dies is noticed at once: its connections close.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """A group of ranks that wait for each other. Each method is collective: every rank calls it, in the same order."""

    group: dist.ProcessGroup | None
    rank: int

    def gather(self, mine: T) -> list[T]:
        """Give every rank the values of all ranks, in rank order. A value must pickle."""
        if self.group is None:
            return [mine]
        try:
            return gather_objects(mine, self.group)
        except RuntimeError as error:
            raise CheckpointError(
                f"A rank has ended while others waited for it to open a checkpoint: {error}"
            ) from error

    def run(self, work: Callable[[], T] | None) -> list[T | None]:
        """Run `work` on the ranks that have some, and give every rank the results of all ranks.

        If it fails on any rank, no rank returns: the one that failed raises its own error, the others a
        `CheckpointError` that repeats its message.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = None if work is None else work()
        except Exception as error:  # noqa: BLE001  # raised below, once the ranks that wait have heard of it
            failure = error
        outcomes = self.gather((result, None if failure is None else f"{failure}" or repr(failure)))
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise CheckpointError(f"Rank {rank} failed: {message}")
        return [value for value, _ in outcomes]


@contextmanager
def rendezvous() -> Iterator[Rendezvous]:
    """Bring all ranks of the default process group together, over gloo whatever its backend. Collective."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Rendezvous(group=None, rank=0)
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Rendezvous(group=group, rank=dist.get_rank())
    finally:
        dist.destroy_process_group(group)


def is_node_leader() -> bool:
    """Whether this rank works for its node: local rank 0. Without `LOCAL_RANK`, all ranks are one node."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    rank = local_rank()
    return (dist.get_rank() if rank is None else rank) == 0
