"""Loading in a thread of its own, which ends with the block that has begun it."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from surgery.comm.ranks import StoppedError

__all__ = ["Background", "Staging", "in_background", "return_freed_memory", "undisturbed"]


#: Elements of a layer at most, however many ranks there are: the statistics of all take 64 MiB on every rank, and about
#: four times as much while they are quantized themselves.
LAYER_LIMIT = 1 << 30

#: Elements that are read at a time: for a GPU 32 MiB of a 16-bit weight, few requests for many bytes; for a CPU 1 MiB,
#: which takes milliseconds to quantize, long against the waking of a thread.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Staging:
    """How a rank reads ahead: `buffers` of `elements` each, filled by `threads`; and how much makes a layer.

    run_elements: how many are quantized at a time; more or less than one buffer holds.
    layer_elements: what one rank reads of a layer is about as much, in elements. Each layer costs a meeting of all
    ranks, and holds its float32 statistics of all ranks.
    """

    elements: int
    buffers: int
    threads: int
    run_elements: int
    layer_elements: int

    def layer_limit(self, world_size: int) -> int:
        """Elements of a layer, over all ranks."""
        return min(self.layer_elements * world_size, LAYER_LIMIT)

    @classmethod
    def on(cls, device: torch.device, *, run_elements: int) -> Staging:
        """A GPU is fed by as many threads as there are cores for it, up to 12: one copies some 3 GB/s out of the page
        cache, and 12 keep ahead of quantizing. A CPU quantizes more slowly than one thread reads.
        """
        if device.type == "cpu":
            return cls(
                elements=CHUNK_ELEMENTS["cpu"],
                buffers=3,
                threads=1,
                run_elements=run_elements,
                layer_elements=1 << 23,
            )
        threads = max(1, min(12, cores() // max(torch.cuda.device_count(), 1)))
        return cls(
            elements=CHUNK_ELEMENTS["cuda"],
            buffers=threads + 4,
            threads=threads,
            run_elements=run_elements,
            layer_elements=1 << 28,
        )


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class Background:
    """Work that runs in a thread; `stop` is set for it when its result is no longer wanted."""

    stop: threading.Event
    # Not `Thread.join`: an interrupt there makes Python 3.11 take the thread for ended, and the next `join` returns.
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _failure: BaseException | None = field(default=None, init=False)

    def wait(self) -> None:
        """Wait for the work to end. Raises what it raised."""
        self._ended.wait()
        if self._failure is not None:
            raise self._failure


def return_freed_memory() -> None:
    """Have the allocator of the C library give what is free back to the system; glibc keeps it by itself, between what
    is still in use, and it would look like memory of this process. Where there is no such function nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """A block that builds a model while other threads read for it.

    Python looks for no reference cycles in it: it would do so again and again, and each look, at every object there is,
    takes longer than what is built between two of them. And where a GPU quantizes, this thread computes alone: a team
    of threads would wait for its members, which the reading threads keep from their cores (3.0 s instead of 1.0 for 8B
    on 16 cores).
    """
    collects, threads = gc.isenabled(), torch.get_num_threads()
    gc.disable()
    if device.type != "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


@contextmanager
def in_background(work: Callable[[], object], *, stop: threading.Event, device: torch.device) -> Iterator[Background]:
    """Run `work` while the block runs. At its end the work has ended too: by itself, or because it was stopped."""
    background = Background(stop)

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
            with torch.no_grad():
                work()
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            background._failure = error
        finally:
            background._ended.set()

    thread = threading.Thread(target=run, name="surgery-load", daemon=True)
    try:
        thread.start()
        yield background
    finally:
        stop.set()
        if thread.ident is not None:  # it was started
            background._ended.wait()
            thread.join()
