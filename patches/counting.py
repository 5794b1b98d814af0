"""Call counts of patch wrappers, on request."""

from __future__ import annotations

import threading
from typing import Any

from .patch import Wrapper

__all__ = ["CallCounter"]


class CallCounter:
    """Number of calls of one wrapper. Exact across threads, except for a traced target.

    A traced target is counted without a lock, which Dynamo cannot trace, so that simultaneous calls may count
    as one.
    """

    __slots__ = ("_lock", "calls")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls = 0

    def around(self, wrapper: Wrapper, *, traced: bool) -> Wrapper:
        """Wrap `wrapper` so that its calls are counted."""

        def counted(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._lock:
                self.calls += 1
            return wrapper(wrapped, instance, args, kwargs)

        def counted_without_lock(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.calls += 1
            return wrapper(wrapped, instance, args, kwargs)

        return counted_without_lock if traced else counted
