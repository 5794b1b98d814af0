"""Heartbeats: each rank shows that its process lives, and watches one other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from surgery.comm.ranks import Ranks, lost

__all__ = ["beating", "silent_ranks", "wait_for_the_others"]

#: Seconds between two beats.
BEAT = 0.5

#: Beats of one's own without one of the other, after which that rank counts as gone: 20 seconds, more than any call
#: that keeps other threads waiting takes. Not the clock's seconds: a machine that stands still would have them pass.
SILENCE = 40

#: The same once a connection is lost, which means that a rank is gone, and it is asked which.
MISSED = 8

#: What a rank that no longer beats, because it has no need to, leaves in its count.
LEFT = 1 << 40


@contextlib.contextmanager
def beating(ranks: Ranks) -> Iterator[None]:
    """A block during which the other ranks are told if this process ends.

    A launcher like torchrun ends the other ranks itself. But collectives alone do not notice an end while ranks wait
    for each other at a gate, which is not one, and do not say whose it was. Each rank watches the next one only, so
    that the store has as much to do as there are ranks; one that has not come to the block yet may take its time.
    """
    if ranks.world_size == 1:
        yield
        return
    with contextlib.suppress(RuntimeError):  # a store that is gone is noticed by whoever needs it
        ranks.count(_key(ranks, ranks.rank), 1)
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(ranks, done), name="surgery-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def silent_ranks(ranks: Ranks) -> list[int]:
    """The ranks without a heartbeat for as long as `MISSED` beats take; the others have to be in `beating`.

    Raises `PeerError` at once if one of them reports a failure.
    """
    others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    try:
        before = _counts(ranks, others)
        for _ in range(MISSED):
            ranks.raise_peer_failure()
            time.sleep(BEAT)
        after = _counts(ranks, others)
    except RuntimeError as error:
        raise ranks.lost_store() from error
    return [rank for rank in others if after[rank] == before[rank] < LEFT]


def wait_for_the_others(ranks: Ranks, *, ended: int | None = None) -> None:
    """Wait until all ranks but the one that has `ended` have left `beating`, so that they can read why a rank failed.

    For three times `MISSED` beats at most, since another one may be gone too.
    """
    others = [rank for rank in range(ranks.world_size) if rank != ended]
    with contextlib.suppress(RuntimeError):
        for _ in range(30 * MISSED):
            if min(_counts(ranks, others).values()) >= LEFT:
                return
            time.sleep(BEAT / 10)


def _key(ranks: Ranks, rank: int) -> str:
    return f"{ranks.prefix}/heartbeat/{rank}"


def _counts(ranks: Ranks, of: list[int] | range) -> dict[int, int]:
    return {rank: ranks.count(_key(ranks, rank), 0) for rank in of}


def _beat(ranks: Ranks, done: threading.Event) -> None:
    watched = (ranks.rank + 1) % ranks.world_size
    last, silent = 0, 0
    with contextlib.suppress(RuntimeError):
        while not done.wait(BEAT):
            ranks.count(_key(ranks, ranks.rank), 1)
            count = ranks.count(_key(ranks, watched), 0)
            silent = 0 if count != last or count >= LEFT or count == 0 else silent + 1
            last = count
            if silent > SILENCE:
                ranks.relay_failure(lost(watched))
                return
        ranks.count(_key(ranks, ranks.rank), LEFT)
