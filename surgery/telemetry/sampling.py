"""The memory of this process, looked at again and again from a thread."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["SAMPLE_PERIOD", "Sampler", "anonymous_memory"]

#: Seconds between two looks at the process's memory, at first. A layer takes milliseconds to seconds.
SAMPLE_PERIOD = 0.005

#: What lasts is looked at less often: the time since it began, divided by this, is between two looks, up to so many
#: seconds. Each wakes a thread, which takes a core 100 microseconds: every 5 ms that would be 2 % of it.
LOOKS = 200
LONGEST_PERIOD = 0.05


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


class Sampler:
    """Calls functions again and again from one thread, however many they are: a wake-up costs more than a look."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._looks: list[Callable[[], None]] = []
        self._lock = threading.Lock()  # held while functions are called
        self._began = 0.0  # the last of them
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def calling(self, look: Callable[[], None]) -> Iterator[None]:
        """Call `look` when the block begins, again and again from a thread while it runs, and when it ends.

        Calls never overlap. What lasts for less than the time between two of them may go unseen: that is `period`
        seconds, and after a while more.
        """
        look()
        self._add(look)
        try:
            yield
        finally:
            self._remove(look)
            look()

    def _add(self, look: Callable[[], None]) -> None:
        with self._lock:
            self._looks.append(look)
            self._began = time.monotonic()
            if len(self._looks) > 1:
                return
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._repeat, args=(self._done,), name="surgery-memory", daemon=True)
            self._thread.start()

    def _remove(self, look: Callable[[], None]) -> None:
        with self._lock:
            self._looks.remove(look)
            if self._looks:
                return
            self._done.set()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _repeat(self, done: threading.Event) -> None:
        while not done.wait(max(self._period, min((time.monotonic() - self._began) / LOOKS, LONGEST_PERIOD))):
            with self._lock:
                for look in self._looks if not done.is_set() else ():
                    look()
