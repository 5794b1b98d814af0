"""Run families in separate processes, so that a crash or a hang affects only one row."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final

from families.outcome import Outcome
from tests.helpers.ranks import PRELOAD

__all__ = ["outcomes"]

#: Seconds after which a family is given up.
LIMIT: Final = 300.0

#: Families per process: the first costs seconds of imports, and each leaves some memory behind.
CHUNK: Final = 20

Check = Callable[[str, bool], Outcome]
Task = tuple[str, bool]


def outcomes(families: Sequence[Task], check: Check, *, jobs: int = 1, limit: float = LIMIT) -> Iterator[Outcome]:
    """Run `check` on each `(family, whether with two ranks)` in `jobs` processes; yields outcomes as they come.

    If a process dies, or is not done after `limit` seconds, the outcome is `differs`.
    """
    waiting, workers = list(families), list[_Worker]()
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_start(check, waiting.pop(0)))
            ready = wait([worker.pipe for worker in workers], timeout=1)
            for worker in list(workers):
                outcome = worker.outcome(ready, limit)
                if outcome is None:
                    continue
                yield outcome
                if waiting and worker.can_go_on:
                    worker.give(waiting.pop(0))
                    continue
                workers.remove(worker)
                worker.end()
    finally:
        for worker in workers:
            worker.end()


@dataclass(eq=False)
class _Worker:
    """A worker process, and the family that it is checking."""

    process: BaseProcess
    pipe: Connection
    family: str = ""
    since: float = 0.0
    taken: int = 0
    can_go_on: bool = True

    def give(self, task: Task) -> None:
        """Send a family. Its time starts now; for the first one, when the started process sends None."""
        self.since = time.monotonic() if self.taken else math.inf
        self.family, self.taken = task[0], self.taken + 1
        self.pipe.send(task)

    def outcome(self, ready: Collection[object], limit: float) -> Outcome | None:
        """The outcome of the family, or None while it runs."""
        seconds = time.monotonic() - self.since
        if self.pipe in ready:
            return self._received(seconds)
        return self._lost(f"not done after {limit:.0f} s") if seconds > limit else None

    def _received(self, seconds: float) -> Outcome | None:
        try:
            outcome: Outcome | None = self.pipe.recv()
        except (EOFError, ConnectionError):
            return self._lost("the process ended by itself")
        if outcome is None:
            self.since = time.monotonic()
            return None
        self.can_go_on = self.taken < CHUNK
        return replace(outcome, seconds=round(seconds, 1))

    def _lost(self, why: str) -> Outcome:
        self.can_go_on = False
        return Outcome(family=self.family, verdict="differs", why=why)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _start(check: Check, task: Task) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(check, theirs))
    process.start()
    theirs.close()
    worker = _Worker(process, ours)
    worker.give(task)
    return worker


def _work(check: Check, pipe: Connection) -> None:
    """Check families from the pipe until killed."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    quiet = os.open(os.devnull, os.O_WRONLY)  # for hundreds of upstream warnings
    for stream in (sys.stdout, sys.stderr):
        os.dup2(quiet, stream.fileno())
    pipe.send(None)
    while True:
        pipe.send(check(*pipe.recv()))
