"""Read ranges of tensors ahead of their use: several threads, a bounded number of buffers, results in order."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Self

import torch

from surgery.checkpoint.header import TensorEntry
from surgery.checkpoint.reader import Reader

__all__ = ["Chunk", "Prefetch", "Request", "Segment"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The flattened tensor `entry`, which is the elements from `start` on of one that is put together of several.

    is_turned: whether each matrix of `entry`, which is 3-D, is transposed in the other.
    """

    entry: TensorEntry
    start: int = 0
    is_turned: bool = False

    @property
    def unit(self) -> int:
        """Elements that can only be read together: 1, or those of a matrix that is transposed."""
        return math.prod(self.entry.shape[1:]) if self.is_turned else 1

    @property
    def stop(self) -> int:
        """The element behind its last."""
        return self.start + self.entry.numel

    @classmethod
    def joined(cls, entries: Sequence[TensorEntry]) -> tuple[Self, ...]:
        """Whole tensors, one behind the other."""
        starts = accumulate((entry.numel for entry in entries), initial=0)
        return tuple(cls(entry=entry, start=start) for entry, start in zip(entries, starts, strict=False))


@dataclass(frozen=True, kw_only=True)
class Request:
    """Elements `start` to `stop` (exclusive) of what `segments` are, one behind the other, flat; at least one.

    All segments are of one dtype. `start` and `stop` are multiples of `unit`.
    """

    segments: tuple[Segment, ...] = field(repr=False)
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
        return self.segments[0].entry.dtype

    @property
    def unit(self) -> int:
        """Elements that can only be read together."""
        return self.segments[0].unit

    @property
    def nbytes(self) -> int:
        """Size of what is read."""
        return (self.stop - self.start) * self.dtype.itemsize

    def parts(self) -> Iterator[tuple[TensorEntry, int, int]]:
        """`(entry, start, stop)` of the ranges of tensors that it is."""
        at = bisect_right(self.segments, self.start, key=lambda segment: segment.start) - 1
        done = self.start
        while done < self.stop:
            segment = self.segments[at]
            stop = min(segment.stop, self.stop)
            yield segment.entry, done - segment.start, stop - segment.start
            done, at = stop, at + 1


@dataclass(kw_only=True, eq=False)
class Chunk:
    """A piece of a request: `data` (1-D, in the dtype of the file) begins at the element `start` of its segments.

    The memory is used again once `release` was called, and the caller's `until` (an event of the device that still
    copies from it) has happened.
    """

    start: int
    data: torch.Tensor
    release: Callable[..., None] = field(repr=False)


class Prefetch:
    """Reader of `requests` in chunks of at most `chunk_elements`, in order; a context manager that ends its threads.

    A rank that asks for chunk after chunk finds them read: `buffers` of them at most are in memory, on pages that
    `pin` locks for the copy engine of a GPU. Buffers are made when they are first read into, each by the thread that
    does. Chunks of a request begin at multiples of `chunk_elements` from its start.
    """

    def __init__(
        self,
        reader: Reader,
        requests: Iterable[Request],
        *,
        chunk_elements: int,
        buffers: int,
        threads: int,
        pin: bool = False,
    ) -> None:
        self._reader = reader
        self._waiting = _chunks(requests, chunk_elements)
        self._chunk_elements = chunk_elements
        self._pin = pin
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="surgery-read")
        self._reading: deque[Future[Chunk]] = deque()
        for _ in range(buffers):
            self._read_next(_Buffer())

    def next(self) -> Chunk:
        """The next chunk, in the order of the requests. Raises what reading it raised; IndexError after the last."""
        return self._reading.popleft().result()

    def close(self) -> None:
        """Read nothing more, and wait for what is being read."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _read_next(self, buffer: _Buffer, until: torch.cuda.Event | None = None) -> None:
        request = next(self._waiting, None)
        if request is not None:
            self._reading.append(self._pool.submit(self._read, request, buffer, until))

    def _read(self, request: Request, buffer: _Buffer, until: torch.cuda.Event | None) -> Chunk:
        if until is not None:
            until.synchronize()
        buffer.make(max(self._chunk_elements, request.unit) * request.dtype.itemsize, pin=self._pin)
        done = 0
        for entry, start, stop in request.parts():
            size = (stop - start) * request.dtype.itemsize
            self._reader.read_bytes(entry, buffer.memory[done : done + size], start=start)
            done += size
        data = buffer.tensor[:done].view(request.dtype)
        if request.segments[0].is_turned:
            data = data.view(-1, *request.segments[0].entry.shape[1:]).mT.reshape(-1)

        def release(until: torch.cuda.Event | None = None) -> None:
            self._read_next(buffer, until)

        return Chunk(start=request.start, data=data, release=release)


class _Buffer:
    """Memory for one chunk, made on first use, again only for a wider dtype: `tensor` and `memory`, both of bytes.

    Through `memory` it is read into without a tensor operation, each of which would stop for the interpreter's lock,
    which many threads want.
    """

    def __init__(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.memory = memoryview(b"")

    def make(self, nbytes: int, *, pin: bool) -> None:
        """Grow to at least `nbytes`."""
        if self.tensor.numel() >= nbytes:
            return
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
        self.memory = self.tensor.numpy().data


def _chunks(requests: Iterable[Request], size: int) -> Iterator[Request]:
    for request in requests:
        step = max(size // request.unit, 1) * request.unit
        for start in range(request.start, request.stop, step):
            yield Request(segments=request.segments, start=start, stop=min(start + step, request.stop))
