"""The lock under which everything changes, and work that may come at any moment but must not wait for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["OperationLock"]


class OperationLock:
    """A re-entrant lock that also does deferred work, between the operations that hold it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._deferred: deque[Callable[[], None]] = deque()

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Hold the lock. Deferred work is done when the outermost operation begins, and when it ends."""
        with self._lock:
            self._depth += 1
            try:
                self._work_off()
                yield
            finally:
                self._work_off()
                self._depth -= 1

    def defer(self, work: Callable[[], None]) -> None:
        """Do `work` under the lock: now if it is free, otherwise with an operation. Never waits.

        For the callbacks of weak references. They run in the middle of anything: an operation of this very
        thread, for which a re-entrant lock is no obstacle, or another's, for which waiting could last for
        ever.
        """
        self._deferred.append(work)
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._depth == 0:
                with self.operation():
                    pass
        finally:
            self._lock.release()

    def _work_off(self) -> None:
        while self._depth == 1 and self._deferred:
            self._deferred.popleft()()
