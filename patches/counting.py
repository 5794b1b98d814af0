"""Counting: how many calls went through the wrapper of a patch, where somebody asked for that."""

from __future__ import annotations

import threading
from typing import Any

from .patch import Wrapper

__all__ = ["CallCounter"]


class CallCounter:
    """Calls of one wrapper. Exact from many threads, except where the target is traced.

    There it takes no lock, which Dynamo could not trace, so that calls made at the very same time may count as
    one.
    """

    __slots__ = ("_lock", "calls")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls = 0

    def around(self, wrapper: Wrapper, *, traced: bool) -> Wrapper:
        """`wrapper`, counted."""

        def counted(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._lock:
                self.calls += 1
            return wrapper(wrapped, instance, args, kwargs)

        def counted_without_lock(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.calls += 1
            return wrapper(wrapped, instance, args, kwargs)

        return counted_without_lock if traced else counted
