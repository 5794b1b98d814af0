"""Read tensors, or ranges of them, into memory of exactly their size.

Nothing is mapped: the pages of a mapped file stay in the process's resident memory after use, and look like
a copy of the checkpoint. `preadv` into a tensor that is there already costs the bytes asked for and no more.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch

from surgery.checkpoint.header import TensorEntry
from surgery.checkpoint.index import Index
from surgery.errors import CheckpointError

__all__ = ["Reader", "samples"]

#: From this size on, in bytes, a tensor gets pages of its own.
OWN_PAGES = 1 << 20


class Reader:
    """Reader of the files of a checkpoint, each opened once, on first use; closes them as a context manager.

    A tensor is given by its name in `index` or by its entry. Any number of threads may read at the same time;
    close the reader after the last one has finished. `on_read` is told of every number of bytes, by the thread that
    has read them.
    """

    def __init__(self, index: Index, *, on_read: Callable[[int], None] | None = None) -> None:
        self._index = index
        self._on_read = on_read
        self._descriptors: dict[Path, int] = {}
        self._bytes_read: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, tensor: str | TensorEntry) -> torch.Tensor:
        """Read a whole tensor: in its shape and dtype, contiguous, on the CPU, in memory of its own."""
        entry = self._entry(tensor)
        return self.read_range(entry, 0, entry.numel).view(entry.shape)

    def read_range(self, tensor: str | TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Read the elements `start` to `stop` (exclusive) of the flattened tensor: 1-D, on the CPU."""
        entry = self._entry(tensor)
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(
                f"Expected 0 <= start <= stop <= {entry.numel} for {entry.name!r}, found start={start}, stop={stop}."
            )
        out = _empty(stop - start, entry.dtype)
        self.read_into(entry, out, start=start)
        return out

    def read_into(self, tensor: str | TensorEntry, out: torch.Tensor, *, start: int = 0) -> None:
        """Fill `out` with as many elements as it has, from element `start` of the flattened tensor on.

        `out` is contiguous, on the CPU (pinned or not), and has the tensor's dtype.
        Raises `CheckpointError`, naming file and tensor, if the file cannot be read or has become shorter.
        """
        entry = self._entry(tensor)
        _check_destination(entry, out, start=start)
        if out.numel() == 0:
            return
        self.read_bytes(entry, out.detach().view(-1).view(torch.uint8).numpy().data, start=start)

    def read_bytes(self, entry: TensorEntry, out: memoryview, *, start: int = 0) -> None:
        """Fill `out` with the bytes of the tensor from element `start` on.

        Like `read_into`, without its checks and without a tensor operation.
        """
        self._fill(entry, out, offset=entry.start + start * entry.dtype.itemsize)

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes read so far, by tensor name: a copy. A range that is read twice counts twice."""
        with self._lock:
            return dict(self._bytes_read)

    @property
    def total_bytes_read(self) -> int:
        """The sum of `bytes_read`."""
        with self._lock:
            return self._bytes_read.total()

    def check_unchanged(self) -> None:
        """Raise `CheckpointError`, naming the file, if one that was read has changed since its header was read."""
        with self._lock:
            for file, descriptor in self._descriptors.items():
                if file in self._index.stamps:
                    self._index.stamps[file].check_header(file, descriptor)

    def close(self) -> None:
        """Close every file. Doing so twice is harmless."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _entry(self, tensor: str | TensorEntry) -> TensorEntry:
        return self._index.entry(tensor) if isinstance(tensor, str) else tensor

    def _fill(self, entry: TensorEntry, buffer: memoryview, *, offset: int) -> None:
        descriptor = self._descriptor(entry)
        done = 0
        # One call moves at most 2 GiB on Linux, and may move less for any reason.
        while done < len(buffer):
            done += self._read_some(descriptor, entry, buffer[done:], offset=offset + done)

    def _read_some(self, descriptor: int, entry: TensorEntry, buffer: memoryview, *, offset: int) -> int:
        try:
            count = os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            raise _unreadable(entry, error) from error
        if count == 0:
            raise _file_too_short(entry, offset=offset)
        with self._lock:
            self._bytes_read[entry.name] += count
        if self._on_read is not None:
            self._on_read(count)
        return count

    def _descriptor(self, entry: TensorEntry) -> int:
        with self._lock:
            if self._closed:
                raise ValueError(f"Cannot read {entry.name!r}: this reader is closed.")
            if entry.file in self._descriptors:
                return self._descriptors[entry.file]
            try:
                descriptor = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _unreadable(entry, error) from error
            self._descriptors[entry.file] = descriptor
            if entry.file in self._index.stamps:
                self._index.stamps[entry.file].check(entry.file, descriptor)
            return descriptor


def _empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor on the CPU, whose memory goes back to the system as soon as it is freed.

    malloc would keep what it is given back: after the first large tensors, glibc serves those of up to 32 MiB from its
    heap, and holds up to twice that for the next.
    """
    size = numel * dtype.itemsize
    if size < OWN_PAGES:
        # The device is named because the caller may be under `with torch.device("meta")`.
        return torch.empty(numel, dtype=dtype, device="cpu")
    # Private, as malloc's are: shared pages would outlive a fork, and count as another kind of memory.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def _check_destination(entry: TensorEntry, out: torch.Tensor, *, start: int) -> None:
    if out.dtype != entry.dtype or out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(
            f"Expected a contiguous {entry.dtype} tensor on the CPU to read {entry.name!r} into, "
            f"found {out.dtype} on {out.device}, {'' if out.is_contiguous() else 'not '}contiguous."
        )
    if start < 0 or start + out.numel() > entry.numel:
        raise ValueError(
            f"Expected a range inside the {entry.numel} elements of {entry.name!r}, "
            f"found {start} to {start + out.numel()}."
        )


def _file_too_short(entry: TensorEntry, *, offset: int) -> CheckpointError:
    return CheckpointError(
        f"{entry.file} ends at byte {offset}, inside tensor {entry.name!r} (bytes {entry.start} to "
        f"{entry.end}): the file has changed since it was opened. Leave it alone while it is being read, "
        "and start again.",
        path=entry.file,
        tensor=entry.name,
    )


def _unreadable(entry: TensorEntry, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Cannot read tensor {entry.name!r} from {entry.file}: {error}.", path=entry.file, tensor=entry.name
    )


#: Bytes of each tensor: no disk or network file system reads less.
SAMPLE = 4096

#: Files that are read at a time: one over a network answers after a millisecond.
THREADS = 8


def samples(index: Index, *, seed: bytes) -> dict[str, str]:
    """Map from tensor name to a hash of `SAMPLE` bytes of it (or of all), at a place that `seed` decides.

    One small read for each tensor, past any cache of ours. Raises `CheckpointError` if a file cannot be read.
    """
    by_file: dict[Path, list[TensorEntry]] = {}
    for entry in index.values():
        by_file.setdefault(entry.file, []).append(entry)
    with ThreadPoolExecutor(min(THREADS, len(by_file) or 1), thread_name_prefix="surgery-sample") as pool:
        found = pool.map(lambda file: _of_file(file, by_file[file], seed), by_file)
    return dict(sorted(pair for of_file in found for pair in of_file.items()))


def _of_file(file: Path, entries: Sequence[TensorEntry], seed: bytes) -> dict[str, str]:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return {entry.name: _of_tensor(descriptor, entry, seed) for entry in entries}
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint file {file}: {error}.", path=file) from error


def _of_tensor(descriptor: int, entry: TensorEntry, seed: bytes) -> str:
    length = min(SAMPLE, entry.nbytes)
    # By the name, so that it does not matter in which order or in which files ranks find their tensors.
    place = int.from_bytes(hashlib.blake2b(entry.name.encode(), key=seed, digest_size=8).digest(), "little")
    start = place % (entry.nbytes - length + 1)
    data = os.pread(descriptor, length, entry.start + start)
    if len(data) < length:
        raise _file_too_short(entry, offset=entry.start + start + len(data))
    return f"{hashlib.blake2b(data, digest_size=8).hexdigest()} of bytes {start} to {start + length}"
