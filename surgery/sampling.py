"""The memory of this process, looked at again and again from a thread."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator

__all__ = ["SAMPLE_PERIOD", "anonymous_memory", "sampled"]

#: Seconds between two looks at the process's memory. A layer takes milliseconds to seconds.
SAMPLE_PERIOD = 0.005


def anonymous_memory() -> int:
    """Bytes of resident memory of this process that no file backs (`RssAnon`); 0 where the kernel does not say.

    From `statm`, which costs a fifth of `status`: pages that are resident, less those that files or shared memory back.
    """
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        _, resident, shared, *_ = os.read(statm, 256).split()
    finally:
        os.close(statm)
    return (int(resident) - int(shared)) * mmap.PAGESIZE


@contextlib.contextmanager
def sampled(look: Callable[[], None], *, period: float = SAMPLE_PERIOD) -> Iterator[None]:
    """Call `look` when the block begins, every `period` seconds from a thread while it runs, and when it ends.

    Calls never overlap. What lasts for less than `period` may go unseen.
    """
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(period):
            look()

    thread = threading.Thread(target=repeat, name="surgery-memory", daemon=True)
    look()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()
