"""Lower bound: each rank only reads its part of the bytes of a checkpoint and copies it to its device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from loading.case import Case
from loading.options import cores_per_rank

__all__ = ["read_bytes"]

#: Bytes per read.
CHUNK = 16 << 20

MAX_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class _Range:
    """A range of `size` bytes of `file` from `offset` on."""

    file: Path
    offset: int
    size: int


def read_bytes(case: Case) -> None:
    """Read with one thread per core of this rank, each into its own buffers, which are pinned for a GPU."""
    world = case.world
    threads = min(MAX_THREADS, cores_per_rank(world.size))
    ranges = list(_ranges(sorted(case.options.checkpoint.glob("*.safetensors"))))
    mine = ranges[world.rank * len(ranges) // world.size : (world.rank + 1) * len(ranges) // world.size]
    with case.report.phase("read"), ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(_read, mine[first::threads], case) for first in range(threads)]
        for future in done:
            future.result()


def _ranges(files: list[Path]) -> Iterator[_Range]:
    for file in files:
        size = file.stat().st_size
        for offset in range(0, size, CHUNK):
            yield _Range(file=file, offset=offset, size=min(CHUNK, size - offset))


def _read(ranges: list[_Range], case: Case) -> None:
    """Read ranges through two buffers, so that one is copied while the other is filled."""
    on_cuda = case.world.on_cuda
    hosts = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(1 + on_cuda)]
    if not on_cuda:
        for each in ranges:
            _fill(hosts[0], each)
        return
    stream = torch.cuda.Stream(case.device)  # type: ignore[no-untyped-call]
    events = [torch.cuda.Event() for _ in hosts]  # type: ignore[no-untyped-call]  # no annotation upstream
    target = torch.empty(CHUNK, dtype=torch.uint8, device=case.device)
    with torch.cuda.stream(stream):
        for number, each in enumerate(ranges):
            host, event = hosts[number % 2], events[number % 2]
            event.synchronize()
            _fill(host, each)
            target.copy_(host, non_blocking=True)
            event.record(stream)
    stream.synchronize()


def _fill(buffer: torch.Tensor, wanted: _Range) -> None:
    memory = buffer.numpy().data
    descriptor = os.open(wanted.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < wanted.size:
            count = os.preadv(descriptor, [memory[done : wanted.size]], wanted.offset + done)
            if count == 0:
                raise EOFError(f"{wanted.file} has become shorter while it was read")
            done += count
    finally:
        os.close(descriptor)
