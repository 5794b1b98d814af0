"""Copies from a GPU into ordinary memory, several at a time."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

__all__ = ["THREADS", "HostCopies"]

#: Memory that is touched for the first time costs a thread 0.6 to 1.2 s a GB in virtual machines; eight share it.
THREADS = 8


class HostCopies:
    """Copies tensors to the CPU in threads of its own; a context manager that ends them. On a CPU it copies at once.

    Each thread has a pinned buffer as large as the largest tensor that it was given, which the GPU copies to. Copies
    into ordinary memory that the driver makes by itself wait for each other, whichever thread asks for them.
    """

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
        mine = self._of_thread
        if not hasattr(mine, "stream"):
            mine.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # none upstream
            mine.pinned = torch.empty(0, dtype=torch.uint8, device="cpu")
        if mine.pinned.numel() < tensor.nbytes:
            mine.pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        pinned = mine.pinned[: tensor.nbytes]
        with torch.cuda.stream(mine.stream):
            ready.wait()
            pinned.copy_(tensor.view(torch.uint8), non_blocking=True)
        mine.stream.synchronize()  # after which `tensor` may be freed
        out.view(torch.uint8).copy_(pinned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
