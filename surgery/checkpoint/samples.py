"""Hashes of a few bytes of every tensor, which tell copies of a checkpoint apart without reading them whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.checkpoint.header import TensorEntry
from surgery.checkpoint.index import Index
from surgery.errors import CheckpointError

__all__ = ["samples"]

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
        raise CheckpointError(
            f"{entry.file} ends inside tensor {entry.name!r}: it has changed since it was opened. Leave it alone while "
            "it is read; start again.",
            path=entry.file,
            tensor=entry.name,
        )
    return f"{hashlib.blake2b(data, digest_size=8).hexdigest()} of bytes {start} to {start + length}"
