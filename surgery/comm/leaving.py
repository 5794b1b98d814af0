"""The end of a process that has used gloo, without a race between its threads and Python's end."""

from __future__ import annotations

import atexit
import functools
import time
from pathlib import Path

import torch.distributed as dist

__all__ = ["leave_after_gloo", "let_gloo_finish"]

#: Seconds between two looks at gloo's threads, and how long to look for.
PAUSE, LIMIT = 0.001, 2.0


def let_gloo_finish() -> None:
    """Wait until no thread of gloo is at work, for two seconds at most. Returns at once where there is no `/proc`.

    A collective is over for those who wait for it before gloo's thread has let go of its tensors. If that thread comes
    last, it needs the interpreter for it, and while Python ends it is given none: the process aborts ("terminate called
    without an active exception", torch 2.13, also without this library), after all its work is done. A mesh, or a
    sharded model, keeps such threads beyond `destroy_process_group`.
    """
    until, idle = time.monotonic() + LIMIT, 0
    while idle < 2 and time.monotonic() < until:  # twice: one that slept may have slept for the interpreter
        time.sleep(PAUSE)
        idle = 0 if _any_at_work() else idle + 1


@functools.cache
def leave_after_gloo() -> None:
    """Have this process call `let_gloo_finish` at its end; to be called where a process group is used."""
    if dist.is_gloo_available():
        atexit.register(let_gloo_finish)


def _any_at_work() -> bool:
    """Whether a thread named by gloo runs or waits for a core, which Linux says after the name in parentheses."""
    for file in Path("/proc/self/task").glob("*/stat"):
        try:
            name, state = file.read_text().rsplit(")", 1)
        except OSError:  # it has ended meanwhile
            continue
        if "gloo_runloop" in name and state.split()[0] == "R":
            return True
    return False
