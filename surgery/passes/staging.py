"""Reading ahead: how far, and how much of a model is loaded together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

__all__ = ["CHUNK_ELEMENTS", "LAYER_LIMIT", "Staging", "cores"]

#: Most elements of a batch, however many ranks there are: the statistics of all take 64 MiB on every rank, and about
#: four times as much while they are quantized themselves.
LAYER_LIMIT = 1 << 30

#: Elements that are read at a time: for a GPU 32 MiB of a 16-bit weight, few requests for many bytes; for a CPU 1 MiB,
#: which takes milliseconds to quantize, long against the waking of a thread.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Buffers that a rank reads ahead into: `buffers` of `elements` each, filled by `threads`; and the size of a batch.

    layer_elements: elements of a batch that one rank reads, about. Each batch costs a meeting of all ranks, and holds
    its float32 statistics of all ranks.
    """

    elements: int
    buffers: int
    threads: int
    layer_elements: int

    def layer_limit(self, world_size: int) -> int:
        """Most elements of a batch, over all ranks."""
        return min(self.layer_elements * world_size, LAYER_LIMIT)

    @classmethod
    def on(cls, device: torch.device) -> Staging:
        """The staging for a kind of device.

        A GPU is fed by as many threads as there are cores for it, up to 12: one copies some 3 GB/s out of the page
        cache, and 12 keep ahead of quantizing. A CPU quantizes more slowly than one thread reads.
        """
        if device.type == "cpu":
            return cls(
                elements=CHUNK_ELEMENTS["cpu"],
                buffers=3,
                threads=1,
                layer_elements=1 << 23,
            )
        threads = max(1, min(12, cores() // max(torch.cuda.device_count(), 1)))
        return cls(
            elements=CHUNK_ELEMENTS["cuda"],
            buffers=threads + 4,
            threads=threads,
            layer_elements=1 << 28,
        )


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
