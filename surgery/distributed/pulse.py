"""Noticing that the process of another rank has ended: each shows that it lives, and watches one other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from surgery.distributed.exchange import Ranks, counter

__all__ = ["beating"]

#: Seconds between two beats.
BEAT = 0.5

#: Beats of one's own without one of the other, after which that rank counts as gone: 20 seconds, more than any call
#: that keeps other threads waiting takes. Not the clock's seconds: a machine that stands still would have them pass.
SILENCE = 40

#: What a rank that no longer beats, because it has no need to, leaves in its count.
LEFT = 1 << 40


@contextlib.contextmanager
def beating(ranks: Ranks) -> Iterator[None]:
    """While the block runs, the other ranks are told if this process ends; to be entered on all ranks at about once.

    A launcher like torchrun ends the other ranks itself. But collectives alone do not notice an end while ranks wait
    for each other at a gate, which is not one. Each rank watches the next one only, so that the store has as much to do
    as there are ranks.
    """
    if ranks.world_size == 1:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(ranks, done), name="surgery-pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(ranks: Ranks, done: threading.Event) -> None:
    watched = (ranks.rank + 1) % ranks.world_size
    mine, others = f"{ranks.alarm}/pulse/{ranks.rank}", f"{ranks.alarm}/pulse/{watched}"
    last, silent = 0, 0
    with contextlib.suppress(RuntimeError):  # a store that is gone is noticed by whoever needs it
        while not done.wait(BEAT):
            counter(mine, 1)
            count = counter(others, 0)
            silent = 0 if count != last or count >= LEFT else silent + 1
            last = count
            if silent > SILENCE:
                ranks.report_lost(watched)
                return
        counter(mine, LEFT)
