"""Forks a process while its threads apply, call, count and undo, and prints how the children ended, as JSON.

`python -m tests.helpers.fork_storm FORKS SECONDS`: a child that has not ended after so many seconds is killed.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers

CALLED, APPLIED, SCOPED = (declare(tag, target) for tag, target in (
    ("called", f"{FUNCTIONS}:scale"), ("applied", f"{LAYERS}:Base.forward"), ("scoped", f"{LAYERS}:Unhashable.to")
))  # fmt: skip
BUSY = threading.Event()


def churn() -> None:
    """Keep the registry busy: transactions, audits, counted calls, a scope that ends by itself."""
    while BUSY.is_set():
        with patches.transaction(CALLED, reason="a storm", count_calls=True):
            functions.scale(1)
            with patches.transaction(SCOPED, reason="a storm", on=[layers.Unhashable(1)]):
                patches.audit()


def look() -> None:
    """Read what is active, which takes the lock too."""
    while BUSY.is_set():
        patches.active()
        functions.scale(1)


def live() -> None:
    """What every child does: a call, a transaction, an audit."""
    functions.scale(2)
    with patches.transaction(APPLIED, reason="a child"):
        assert layers.Base().forward(1) == ("applied", ("Base", 1))
        patches.audit()
    assert layers.Base().forward(1) == ("Base", 1)
    patches.revert_all()
    assert functions.scale(2) == 4


def child(seconds: float) -> str:
    """Fork, and say how the child ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "ended" if status == 0 else "failed"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def main() -> None:
    """Take the number of forks and the limit from the command line."""
    forks, seconds = int(sys.argv[1]), float(sys.argv[2])
    BUSY.set()
    works: list[Callable[[], None]] = [churn, churn, churn, look]
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        ends: collections.Counter[str] = collections.Counter()
        while ends.total() < forks and ends["hung"] < 3:
            ends[child(seconds)] += 1
    finally:
        BUSY.clear()
        for thread in threads:
            thread.join()
    print(json.dumps({**+ends, "left": len(patches.active())}))


if __name__ == "__main__":
    main()
