"""Copies from a GPU into ordinary memory, several at a time."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

__all__ = ["Landing"]

#: A copy into memory that is touched for the first time waits for page faults more than for the bus.
THREADS = 8


class Landing:
    """Copies tensors to the CPU in threads of its own; a context manager that ends them. On a CPU it copies at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="surgery-land")
        self._copies: deque[Future[None]] = deque()
        self._of_thread = threading.local()

    def copy(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fill `out`, on the CPU, with `tensor`, once the work that the current stream has now is done."""
        if self._device.type != "cuda":
            out.copy_(tensor)
            return
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # no annotation upstream
        ready.record()
        self._copies.append(self._pool.submit(self._copy, out, tensor, ready))

    def wait(self) -> None:
        """Wait for all copies that were asked for. Raises what one of them raised."""
        while self._copies:
            self._copies.popleft().result()

    def _copy(self, out: torch.Tensor, tensor: torch.Tensor, ready: torch.cuda.Event) -> None:
        torch.cuda.set_device(self._device)  # of this thread
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # none upstream
        with torch.cuda.stream(self._of_thread.stream):
            ready.wait()
            out.copy_(tensor)  # returns when it is done, so that `tensor` may be freed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
