"""Agreeing across ranks: a failure on one stops all, and none is left waiting in a collective."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from surgery.errors import ConfigError, SurgeryError

__all__ = ["PeerError", "Ranks", "broadcast_from_rank0", "collective", "current_ranks", "everyone"]


class PeerError(SurgeryError):
    """Another rank failed; `rank` is its number, None where it ended without a word, and the message its error."""

    def __init__(self, message: str, *, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others. Without a process group it is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    #: A key of the job's store that a rank in trouble sets, and that the others look at between layers.
    alarm: str = field(default="surgery/alarm", repr=False)

    def raise_alarm(self, error: BaseException) -> None:
        """Tell the other ranks, without waiting for them. Never fails: a store that is gone has nobody to tell."""
        if self.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            _store().set(self.alarm, f"{self.rank}\n{type(error).__name__}: {error}")

    def check_alarm(self) -> None:
        """Raise `PeerError` if another rank has raised the alarm. Costs a round trip to the store."""
        if self.world_size == 1:
            return
        try:
            alarm = _store().get(self.alarm).decode() if _store().check([self.alarm]) else None
        except RuntimeError as error:
            raise _gone() from error
        if alarm is not None:
            rank, _, message = alarm.partition("\n")
            raise PeerError(f"rank {rank} failed: {message}", rank=int(rank))

    def meet(self, device: torch.device) -> None:
        """Wait for the other ranks, on the `device` that their group speaks. `PeerError` if one of them is gone."""
        if self.world_size == 1:
            return
        arrived = torch.ones(1, device=device)
        try:
            dist.all_reduce(arrived)
            arrived.item()  # a GPU is only told to wait, above
        except RuntimeError as error:
            raise _gone() from error


def _gone() -> PeerError:
    return PeerError("another rank has ended without a word: its own output, or the kernel's log, says why", rank=None)


def _store() -> Any:
    """The store that the process group was made with. Private in torch 2.13, and used by torch's own subpackages."""
    return dist.distributed_c10d._get_default_store()


_alarms = itertools.count()


def current_ranks(expected_world_size: int | None = None) -> Ranks:
    """The ranks of the default process group, with an alarm of their own; to be called on all ranks alike.

    `expected_world_size` is what the launcher promised (`WORLD_SIZE`); a process group of another size, or none, would
    train N models side by side without a word, and raises `ConfigError`.
    """
    initialized = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if initialized else 1
    if expected_world_size is not None and expected_world_size != world_size:
        found = f"a process group of {world_size}" if initialized else "no process group"
        raise ConfigError(
            f"the launcher started {expected_world_size} processes (WORLD_SIZE), but there is {found}: call "
            "torch.distributed.init_process_group() on every rank first"
        )
    rank = dist.get_rank() if initialized else 0
    return Ranks(rank=rank, world_size=world_size, alarm=f"surgery/alarm/{next(_alarms)}")


@contextlib.contextmanager
def everyone(ranks: Ranks, *, device: torch.device) -> Iterator[None]:
    """A block without collectives that all ranks leave together: if one fails, all do, with its error.

    A rank that fails raises the alarm, so that the others stop at their next layer instead of finishing, then meets
    them at the end of the block; they raise `PeerError`. A rank that dies outright is noticed there.
    """
    failure: Exception | None = None
    try:
        yield
    except PeerError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  # raised below, once the others are told
        ranks.raise_alarm(error)
        failure = error
    if failure is not None:
        with contextlib.suppress(PeerError):  # a rank that is gone is no news to one that has failed itself
            ranks.meet(device)
        raise failure
    ranks.meet(device)
    ranks.check_alarm()


@contextlib.contextmanager
def collective(ranks: Ranks) -> Iterator[None]:
    """A block with collectives: what they raise once another rank has failed in it becomes that rank's `PeerError`.

    The ranks do not meet at its end, because they could be waiting for each other inside: the others notice when the
    process of the one that failed has ended.
    """
    try:
        yield
    except Exception as error:
        try:
            ranks.check_alarm()
        except PeerError as peer:
            if peer.rank is not None:
                raise peer from error
        ranks.raise_alarm(error)
        raise


def broadcast_from_rank0(tensors: Iterable[torch.Tensor], *, device: torch.device) -> None:
    """Give every rank rank 0's values, in place; to be called on all ranks alike. `device` is what the group speaks."""
    for tensor in tensors:
        sent = tensor.detach().to(device)
        dist.broadcast(sent, src=0)
        tensor.data.copy_(sent)
