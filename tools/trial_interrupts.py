"""Deliver signals at random moments to a process that opens and closes transactions, and count what they leave."""

from __future__ import annotations

import gc
import json
import random
import signal
import sys
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import typer

import patches

ROUNDS = 200  # transactions a signal is waited for, at most
LONGEST = 0.003  # seconds until a signal


@dataclass
class Found:
    """Counts of a trial."""

    signals: int = 0
    """Signals that interrupted the loop."""
    swallowed: int = 0
    """Signals that Python reported without raising: they came in a finalizer."""
    left: int = 0
    """Interrupts right after which something was still patched."""
    cleared_by_dropping: int = 0
    """Those of them that were undone once the exception, and with it the transaction, was dropped."""
    cleared_by_revert_all: int = 0
    """Those of them that `patches.revert_all()` undid."""
    stuck: int = 0
    """Those that neither undid."""


class Base:
    """Class to patch."""

    def run(self, x: int) -> int:
        """Return the argument."""
        return x


class Derived(Base):
    """Class to patch where it inherits."""


def add(x: int) -> int:
    """Add one."""
    return x + 1


def passing(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    """Call the original."""
    return wrapped(*args, **kwargs)


HERE = sys.modules[__name__]
STOCK = vars(HERE)["add"], vars(Base)["run"]
ITEMS = [
    patches.Patch(id=f"trial.{name.lower()}", target=f"{__name__}:{path}", wrapper=passing, reason="a trial")
    for name, path in (("function", "add"), ("method", "Base.run"), ("inherited", "Derived.run"))
]


def is_clean() -> bool:
    """Whether nothing is patched: by what is there, and by what the registry says."""
    there = vars(HERE)["add"], vars(Base)["run"]
    same = all(one is other for one, other in zip(there, STOCK, strict=True))
    return same and "run" not in vars(Derived) and not patches.active()


def loop(covered: Base) -> None:
    """Open and close transactions, one with a scope and one inside another."""
    for _ in range(ROUNDS):
        with patches.transaction(ITEMS[0], patches.on(ITEMS[1], [covered]), reason="a trial"):
            add(1)
            with patches.transaction(ITEMS[2]):
                Derived().run(1)


def interrupt(found: Found, moments: random.Random, covered: Base) -> None:
    """Run the loop until one signal, and look what it has left, while the exception is alive and after that."""
    left = False
    try:
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, LONGEST))
        loop(covered)
        found.swallowed += 1
    except KeyboardInterrupt:
        found.signals += 1
        left = not is_clean()
        found.left += left
        if left and found.left % 2:
            patches.revert_all()
            found.cleared_by_revert_all += is_clean()
            found.stuck += not is_clean()
            left = False
    if not left:
        return
    if not is_clean():
        gc.collect()
    found.cleared_by_dropping += is_clean()
    found.stuck += not is_clean()


def main(
    signals: Annotated[int, typer.Option(help="Number of signals.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Interrupt a loop of transactions, print what was left, and exit with 1 if anything could not be undone."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # what SIGINT does, at a time of our choice
    sys.unraisablehook = lambda _: None  # counted
    found, moments, covered = Found(), random.Random(seed), Base()  # noqa: S311 - no secret
    loop(covered)
    gc.freeze()  # so that collecting is quick, and no signal waits for it
    for _ in range(signals):
        gc.collect()
        interrupt(found, moments, covered)
        if found.stuck:
            patches.revert_all()
            break
    counts = {**asdict(found), "probability": found.left / max(1, found.signals)}
    if as_json:
        print(json.dumps(counts))
    else:
        for name in (*(field.name for field in fields(Found)), "probability"):
            print(f"{name:24}{counts[name]:>10.6g}")
    if found.stuck:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
