"""Run every family in a process of its own, so that a crash or a hang of one is a row and no more."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Final

from families.outcome import Outcome
from tests.helpers.ranks import PRELOAD

__all__ = ["outcomes"]

#: Seconds after which a family is given up.
LIMIT: Final = 300.0

Check = Callable[[str, bool], Outcome]
Running = tuple[str, float, ForkServerProcess]


def outcomes(
    families: Sequence[tuple[str, bool]], check: Check, *, jobs: int = 1, limit: float = LIMIT
) -> Iterator[Outcome]:
    """What `check` says of each `(family, whether with two ranks)`, as it comes, of `jobs` at a time.

    A process that ends by itself, or is not done after `limit` seconds, is an outcome that differs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "families.check"])
    waiting, running = list(families), dict[Connection, Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                family, shard = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(check, family, shard, sender))
                process.start()
                sender.close()
                running[receiver] = (family, time.monotonic(), process)
            yield from _ended(running, limit)
    finally:
        for _, _, process in running.values():
            process.kill()


def _ended(running: dict[Connection, Running], limit: float) -> Iterator[Outcome]:
    """The outcomes of the processes that are done, or out of time, and are taken out of `running`."""
    ready = wait(list(running), timeout=1)
    late = [pipe for pipe, (_, start, _) in running.items() if time.monotonic() - start > limit]
    for pipe in {*ready, *late}:
        family, start, process = running.pop(pipe)
        yield replace(_received(pipe, family, process, limit), seconds=round(time.monotonic() - start, 1))


def _received(pipe: Connection, family: str, process: ForkServerProcess, limit: float) -> Outcome:
    try:
        if pipe.poll():
            outcome: Outcome = pipe.recv()
            return outcome
        return Outcome(family=family, verdict="differs", why=f"not done after {limit:.0f} s")
    except EOFError:
        return Outcome(family=family, verdict="differs", why="the process ended by itself")
    finally:
        process.kill()
        process.join()
        pipe.close()


def _work(check: Check, family: str, shard: bool, sender: Connection) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stderr.fileno())  # warnings of upstream, hundreds of them
    os.dup2(quiet, sys.stdout.fileno())
    sender.send(check(family, shard))
