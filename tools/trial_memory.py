"""Apply and undo patches many times, and print how the memory of the process grows."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

import patches

PAGE = 4096


class Target:
    """Class to patch."""

    def run(self, x: int) -> int:
        """Return the argument."""
        return x


def passing(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    """Call the original."""
    return wrapped(*args, **kwargs)


ITEMS = [
    patches.Patch(id="trial.method", target=f"{__name__}:Target.run", wrapper=passing, reason="a trial"),
    patches.Patch(id="trial.value", target=f"{__name__}:PAGE", kind="value", replace=1, reason="a trial"),
]


def cycle(times: int) -> None:
    """Apply and undo, with a scope, and with an exception that passes through."""
    covered = Target()
    for number in range(times):
        with suppress(ZeroDivisionError), patches.transaction(ITEMS[1], patches.on(ITEMS[0], [covered])):
            covered.run(1 // (number % 10))


def resident() -> int:
    """Bytes of memory that the process has resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def traced() -> int:
    """Bytes that Python has allocated since tracing began."""
    return tracemalloc.get_traced_memory()[0]


def main(
    cycles: Annotated[int, typer.Option(help="Number of times to apply and undo.")] = 100_000,
    warm_up: Annotated[int, typer.Option(help="Times before the first measurement.")] = 1000,
    trace: Annotated[bool, typer.Option("--trace", help="Measure what Python allocates, not the process.")] = False,
    limit: Annotated[float, typer.Option(help="Growth that is allowed, in MiB.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the growth after each tenth of the cycles, and exit with 1 if it exceeds the limit."""
    measure = traced if trace else resident
    if trace:
        tracemalloc.start()
    cycle(warm_up)
    gc.collect()
    first, grown = measure(), []
    for _ in range(10):
        cycle(cycles // 10)
        gc.collect()
        grown.append((measure() - first) / 2**20)
    if as_json:
        print(json.dumps({"cycles": cycles, "grown_mib": grown}))
    else:
        print("\n".join(f"{(step + 1) * cycles // 10:>9} {mib:8.3f} MiB" for step, mib in enumerate(grown)))
    if max(grown) > limit:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
