"""Agreeing across ranks: a failure on one stops all, and none is left waiting in a collective."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import patches
from surgery.errors import ConfigError, SurgeryError

__all__ = [
    "PeerError",
    "Ranks",
    "StoppedError",
    "broadcast_from_rank0",
    "collective",
    "counter",
    "current_ranks",
    "everyone",
    "noticing_ends",
    "rank0_rng_state",
    "same_patches",
]


#: Seconds between two looks at a gate that has been closed for longer than that, and how many such looks there are for
#: one at the alarm: each is a round trip to the store.
GATE_PAUSE = 0.002
LOOKS_PER_ALARM = 16

WITHOUT_A_WORD = "has ended without a word: its own output, or the kernel's log, says why"

#: What a gate has counted once a rank has shut it; ranks that come later do not make up for that.
SHUT = -(1 << 40)


class StoppedError(SurgeryError):
    """This rank itself stopped the work of this thread, because of a failure that is raised elsewhere."""


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
    #: Set once a rank has failed among collectives, or will not wait: the others cannot meet it any more.
    apart: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def raise_alarm(self, error: BaseException, *, apart: bool = False) -> None:
        """Tell the other ranks that this one has failed, without waiting for them.

        apart: it does not come to where all ranks meet.
        """
        self._sound(self.rank, f"failed: {type(error).__name__}: {error}", apart=apart)

    def report_lost(self, rank: int | None) -> None:
        """Tell the other ranks that the process of `rank` has ended; None: of one that is not known."""
        self._sound(rank, WITHOUT_A_WORD, apart=True)

    def _sound(self, rank: int | None, what: str, *, apart: bool) -> None:
        """Never fails: a store that is gone has nobody to tell."""
        if apart:
            self.apart.set()
        if self.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            _store().set(self.alarm, f"{'' if rank is None else rank}\n{int(self.apart.is_set())}\n{what}")
            _store().check([self.alarm])  # what is set is on its way; an answer means that it has arrived

    def check_alarm(self) -> None:
        """Raise `PeerError` if another rank has raised the alarm. Costs a round trip to the store."""
        if self.world_size == 1:
            return
        try:
            alarm = _store().get(self.alarm).decode() if _store().check([self.alarm]) else None
        except RuntimeError as error:
            raise _gone() from error
        if alarm is None:
            return
        rank, apart, what = alarm.split("\n", 2)
        if int(apart):
            self.apart.set()
        raise PeerError(f"rank {rank} {what}" if rank else f"another rank {what}", rank=int(rank) if rank else None)

    def arrive(self, name: str, *, stop: threading.Event) -> None:
        """Come to the gate `name`, without waiting there. Who has arrived calls `pass_gate` later, whatever happens.

        Raises `StoppedError`, without having arrived, if `stop` is set.
        """
        if stop.is_set():
            raise StoppedError("stopped between two layers")
        if self.world_size > 1:
            try:
                counter(self._gate(name), 1)
            except RuntimeError as error:
                raise _gone() from error

    def pass_gate(self, name: str, *, stop: threading.Event) -> None:
        """Wait until every rank has come to `name`, so that all enter the collectives behind it or none does.

        Raises `PeerError` if another rank has raised the alarm instead, and `StoppedError` once `stop` is set.
        """
        if self.world_size == 1:
            return
        key, looks = self._gate(name), 0
        try:
            while counter(key, 0) != self.world_size:
                looks += 1
                reason = self._reason_to_leave(stop, looks)
                if reason is not None and _shut(key, self.world_size):
                    raise reason
        except RuntimeError as error:
            raise _gone() from error

    def _gate(self, name: str) -> str:
        return f"{self.alarm}/gate/{name}"

    def _reason_to_leave(self, stop: threading.Event, looks: int) -> SurgeryError | None:
        """Why not to wait at a gate any longer, after so many `looks` at it and another pause."""
        if stop.wait(min(1e-5 * 2.0 ** min(looks, 16), GATE_PAUSE)):
            return StoppedError("stopped while waiting for the other ranks")
        try:
            if looks % LOOKS_PER_ALARM == 0:
                self.check_alarm()
        except PeerError as error:
            return error
        return None

    def meet(self, device: torch.device, *, failed: bool = False) -> bool:
        """Wait for the other ranks, on the `device` that their group speaks; whether any of them came having `failed`.

        Raises `PeerError` if one is gone.
        """
        if self.world_size == 1:
            return failed
        failures = torch.tensor([float(failed)], device=device)
        try:
            dist.all_reduce(failures)
            return failures.item() > 0
        except RuntimeError as error:
            self.check_alarm()
            raise _gone() from error


def _gone() -> PeerError:
    return PeerError(f"another rank {WITHOUT_A_WORD}", rank=None)


def _shut(key: str, world_size: int) -> bool:
    """Shut a gate. False if all ranks have come to it: then some may have passed, and none may stay behind."""
    arrived = counter(key, 0)
    while 0 <= arrived < world_size:
        if _store().compare_set(key, str(arrived), str(SHUT)) == str(SHUT).encode():
            return True
        arrived = counter(key, 0)
    return arrived < 0


def counter(key: str, more: int) -> int:
    """The value of a counter that all ranks share, after `more` was added to it."""
    return int(_store().add(key, more))


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
    except BaseException as error:  # an interrupt waits for nobody
        ranks.raise_alarm(error, apart=True)
        raise
    if failure is not None and ranks.apart.is_set():
        raise failure
    if failure is not None:
        with contextlib.suppress(PeerError):  # a rank that is gone is no news to one that has failed itself
            ranks.meet(device, failed=True)
        raise failure
    # Asked only if there was a failure: by now the alarm may be one from after this block, which another rank has left.
    if ranks.meet(device):
        ranks.check_alarm()
        raise _gone()


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
        if isinstance(error, PeerError):
            ranks.report_lost(error.rank)
        else:
            ranks.raise_alarm(error, apart=True)
        raise


@contextlib.contextmanager
def noticing_ends() -> Iterator[None]:
    """Around a collective: that it fails means that another rank is gone, and is raised as `PeerError`."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        raise _gone() from error


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
    key = f"{ranks.alarm}/rng"
    if ranks.rank == 0:
        _store().set(key, state.numpy().tobytes())
        return state
    return torch.frombuffer(bytearray(_store().get(key)), dtype=torch.uint8)


_comparisons = itertools.count()


def same_patches(ranks: Ranks, *, device: torch.device) -> None:
    """Raise `ConfigError` on every rank unless all have the same patches active; to be called on all ranks alike.

    Compared is what acts on the whole process: ids, targets, versions (`patches.digest`). A patch that one rank lacks
    would make it compute something else without a word.
    """
    comparison = next(_comparisons)
    if ranks.world_size == 1:
        return
    key = f"{ranks.alarm}/patches/{comparison}"
    with everyone(ranks, device=device):
        _store().set(f"{key}/{ranks.rank}", "\n".join(patches.active_set()))
        alike = f"{key}/{patches.digest()}"
        counter(alike, 1)
    # Every rank has counted itself now, so all come to the same conclusion, usually with this one request.
    if counter(alike, 0) == ranks.world_size:
        return
    active = {rank: _store().get(f"{key}/{rank}").decode().splitlines() for rank in range(ranks.world_size)}
    raise ConfigError(
        f"the ranks have different patches active: {_difference(active)}; apply the same on every rank before the "
        "model is built, for example with patches.replay_from_environment()"
    )


def _difference(active: Mapping[int, Sequence[str]]) -> str:
    """Which lines of `patches.active_set` are on some ranks only."""
    ranks_of: dict[str, list[int]] = {}
    for rank, lines in active.items():
        for line in lines:
            ranks_of.setdefault(line, []).append(rank)
    partial = {line: ranks for line, ranks in sorted(ranks_of.items()) if len(ranks) < len(active)}
    return "; ".join(f"{line} on rank {', '.join(map(str, ranks))} only" for line, ranks in partial.items())
