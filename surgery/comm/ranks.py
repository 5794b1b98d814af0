"""Ranks of a job, and the failures, gates, counters and small values that they share through its store."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from surgery.comm.leaving import leave_after_gloo
from surgery.errors import ConfigError, SurgeryError

__all__ = ["PeerError", "Ranks", "StoppedError", "broadcast_from_rank0", "current_ranks", "lost", "rank0_rng_state"]


#: Seconds between two looks at a gate that has been closed for longer than that, and how many such looks there are for
#: one at the failure key: each is a round trip to the store.
GATE_PAUSE = 0.002
LOOKS_PER_CHECK = 16

#: What a gate has counted once a rank has shut it; ranks that come later do not make up for that.
SHUT = -(1 << 40)


class StoppedError(SurgeryError):
    """This rank itself stopped the work of this thread, because of a failure that is raised elsewhere."""


class PeerError(SurgeryError):
    """Another rank failed; `rank` is its number, None where that cannot be known, and the message its error."""

    def __init__(self, message: str, *, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


def lost(rank: int | None) -> PeerError:
    """The error for a process that has ended: of `rank`, or of one that is not known (None)."""
    which = "another rank" if rank is None else f"rank {rank}"
    return PeerError(f"{which} has ended without a word: its own output, or the kernel's log, says why", rank=rank)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rank of this process, and the store that it shares with the others; rank 0 of 1 without a process group."""

    rank: int = 0
    world_size: int = 1
    #: The beginning of the keys of these ranks in the job's store.
    prefix: str = field(default="surgery", repr=False)
    #: The store that the process group was made with; it may outlive the group. None without one.
    store: Any = field(default=None, repr=False, compare=False)
    #: Set once a rank has failed among collectives, or will not wait: the others cannot meet it any more.
    desynced: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def report_failure(self, error: BaseException, *, desynced: bool = False) -> None:
        """Tell the other ranks that this one has failed, without waiting for them.

        desynced: it does not come to where all ranks meet.
        """
        message = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        self._report(PeerError(message, rank=self.rank), desynced=desynced)

    def relay_failure(self, error: PeerError) -> None:
        """Tell the other ranks of the failure of another one."""
        self._report(error, desynced=True)

    def _report(self, failure: PeerError, *, desynced: bool) -> None:
        """Set the failure key. The first failure stays, as the cause of those after it. Never fails: a store that is
        gone has nobody to tell.
        """
        if desynced:
            self.desynced.set()
        if self.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            if desynced:
                self.count(f"{self.prefix}/desynced", 1)
            # The answer means that it has arrived.
            self.store.compare_set(self._failure_key, "", f"{'' if failure.rank is None else failure.rank}\n{failure}")

    def raise_peer_failure(self) -> None:
        """Raise `PeerError` if another rank has reported a failure. Costs a round trip to the store."""
        if self.world_size == 1:
            return
        try:
            if not self.store.check([self._failure_key]):
                return
            rank, message = self.store.get(self._failure_key).decode().split("\n", 1)
            if self.count(f"{self.prefix}/desynced", 0):
                self.desynced.set()
        except RuntimeError as error:
            raise self.lost_store() from error
        raise PeerError(message, rank=int(rank) if rank else None)

    def lost_store(self) -> PeerError:
        """The error for a store that does not answer, since the process that holds it has ended."""
        return lost(store_holder(self.store))

    def count(self, key: str, more: int) -> int:
        """The value of a counter that all ranks share, after `more` was added to it."""
        return int(self.store.add(key, more))

    def arrive(self, name: str, *, stop: threading.Event) -> None:
        """Arrive at the gate `name`, without waiting there. A rank that has arrived has to call `pass_gate` later.

        Raises `StoppedError`, without having arrived, if `stop` is set.
        """
        if stop.is_set():
            raise StoppedError("stopped between two layers")
        if self.world_size > 1:
            try:
                self.count(self._gate(name), 1)
            except RuntimeError as error:
                raise self.lost_store() from error

    def pass_gate(self, name: str, *, stop: threading.Event) -> None:
        """Wait until every rank has arrived at `name`, so that all enter the collectives behind it or none does.

        Raises `PeerError` if another rank has reported a failure instead, or has not come within the time limit of the
        process group, and `StoppedError` once `stop` is set.
        """
        if self.world_size == 1:
            return
        key, looks, limit = self._gate(name), 0, time.monotonic() + self.store.timeout.total_seconds()
        try:
            while self.count(key, 0) != self.world_size:
                looks += 1
                reason = self._reason_to_leave(stop, looks, limit)
                if reason is not None and self._shut(key):
                    raise reason
        except RuntimeError as error:
            raise self.lost_store() from error

    def _gate(self, name: str) -> str:
        return f"{self.prefix}/gate/{name}"

    @property
    def _failure_key(self) -> str:
        """A key that the first rank in trouble sets, and that the others look at between layers."""
        return f"{self.prefix}/failure"

    def _reason_to_leave(self, stop: threading.Event, looks: int, limit: float) -> SurgeryError | None:
        """The reason to stop waiting at a gate, after so many `looks` at it and another pause; None to go on."""
        if stop.wait(min(1e-5 * 2.0 ** min(looks, 16), GATE_PAUSE)):
            return StoppedError("stopped while waiting for the other ranks")
        try:
            if looks % LOOKS_PER_CHECK == 0:
                self.raise_peer_failure()
        except PeerError as error:
            return error
        return None if time.monotonic() < limit else self.too_slow()

    def too_slow(self) -> PeerError:
        """The error for a rank that lives, and does not come to where all ranks meet."""
        return PeerError(
            f"another rank has not come to where all ranks meet within {self.store.timeout}, though none has ended: it "
            "is stuck, or that much slower; its own output may say why. init_process_group(timeout=...), or "
            "--ddp-timeout of surgery finetune, sets the limit",
            rank=None,
        )

    def _shut(self, key: str) -> bool:
        """Shut a gate. False if all ranks have come to it: then some may have passed, and none may stay behind."""
        arrived = self.count(key, 0)
        while 0 <= arrived < self.world_size:
            if self.store.compare_set(key, str(arrived), str(SHUT)) == str(SHUT).encode():
                return True
            arrived = self.count(key, 0)
        return arrived < 0


def store_holder(store: Any) -> int | None:
    """The rank whose process holds `store`; None if it is no rank's, as torchrun's is."""
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]  # upstream's list of names lacks it
        store = store.underlying_store
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return 0 if isinstance(store, dist.TCPStore) and not of_launcher else None  # type: ignore[attr-defined]


_prefixes = itertools.count()


def current_ranks(expected_world_size: int | None = None) -> Ranks:
    """The ranks of the default process group, with a prefix of their own; to be called on all ranks alike.

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
    if initialized:
        leave_after_gloo()
    return Ranks(
        rank=dist.get_rank() if initialized else 0,
        world_size=world_size,
        prefix=f"surgery/{next(_prefixes)}",
        # Private in torch 2.13, and used by torch's own subpackages.
        store=dist.distributed_c10d._get_default_store() if initialized else None,
    )


def broadcast_from_rank0(tensors: Iterable[torch.Tensor], *, device: torch.device) -> None:
    """Give every rank rank 0's values, in place; to be called on all ranks alike. `device` is what the group speaks."""
    for tensor in tensors:
        sent = tensor.detach().to(device)
        dist.broadcast(sent, src=0)
        tensor.data.copy_(sent)


def rank0_rng_state(ranks: Ranks) -> torch.Tensor:
    """The state of rank 0's CPU generator; to be called on all ranks alike."""
    state = torch.get_rng_state()
    if ranks.world_size == 1:
        return state
    key = f"{ranks.prefix}/rng"
    if ranks.rank == 0:
        ranks.store.set(key, state.numpy().tobytes())
        return state
    return torch.frombuffer(bytearray(ranks.store.get(key)), dtype=torch.uint8)
