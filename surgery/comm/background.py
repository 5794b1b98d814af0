"""Background loading in a thread that ends with the block that started it."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from surgery.comm.ranks import StoppedError

__all__ = ["Background", "in_background", "return_freed_memory", "undisturbed"]


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
    """A block that builds a model, undisturbed by the threads that read for it.

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
