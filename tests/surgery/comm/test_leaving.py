"""A process that has used gloo ends only after gloo's threads have let go of its tensors."""

from __future__ import annotations

import atexit
import gc
import os
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from surgery.comm.leaving import let_gloo_finish
from surgery.comm.ranks import current_ranks
from tests.helpers.apart import run_apart

TRIES = 300


def _gloo_on_one_core() -> None:
    """A process group of one, whose threads get what this thread leaves of the core that they share."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    core = {next(iter(os.sched_getaffinity(0)))}
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), core)
        if "gloo" in (thread / "comm").read_text():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)


def _still_held() -> tuple[int, int]:
    """How many of `TRIES` tensors are still there when their collective is over and nobody here has them: at once, and
    after gloo was waited for.
    """
    _gloo_on_one_core()
    gc.disable()
    at_once = after_waiting = 0
    for _ in range(TRIES):
        tensor = torch.ones(1000)
        seen = weakref.ref(tensor)
        dist.all_reduce(tensor)
        del tensor
        at_once += seen() is not None
        let_gloo_finish()
        after_waiting += seen() is not None
    return at_once, after_waiting


def test_tensors_are_let_go_of() -> None:
    at_once, after_waiting = run_apart(_still_held)
    assert at_once > 0
    assert after_waiting == 0


def _callbacks_at_exit() -> list[int]:
    """How many there are more: without a process group, with one, and once that is used again."""
    before, counts = atexit._ncallbacks(), []  # type: ignore[attr-defined]
    for begin in (lambda: None, _gloo_on_one_core, lambda: None):
        begin()
        current_ranks()
        counts.append(atexit._ncallbacks() - before)  # type: ignore[attr-defined]
    return counts


def test_it_is_waited_for_once_at_the_end_of_a_process_that_has_ranks() -> None:
    assert run_apart(_callbacks_at_exit) == [0, 1, 1]
