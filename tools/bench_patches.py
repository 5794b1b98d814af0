"""Measure the cost of a patched call, of applying and undoing a patch, and of importing the package, as medians."""

from __future__ import annotations

import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
import wrapt

import patches

CALLS = 20_000
ROUNDS = 15
IMPORTS = 11


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement and its limit."""

    what: str
    value: float
    unit: str
    against: str
    limit: float

    @property
    def within(self) -> bool:
        """Whether the measurement is within the limit."""
        return self.value <= self.limit


class Thing:
    """Class to patch."""

    def run(self, x: int) -> int:
        """Do almost nothing, so that the overhead dominates."""
        return x

    def two(self, x: int) -> int:
        """Be patched for two objects."""
        return x

    def many(self, x: int) -> int:
        """Be patched for two thousand objects."""
        return x


def add(x: int) -> int:
    """Do almost nothing, so that the overhead dominates."""
    return x


floor = math.floor


def passing(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the original: the body of every wrapper here."""
    return wrapped(*args, **kwargs)


def function_by_hand(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hand-written alternative to a patch of a function: a closure that calls the same wrapper body."""

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return passing(function, None, args, kwargs)

    return patched


def method_by_hand(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hand-written alternative to a patch of a method."""

    @functools.wraps(function)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return passing(function.__get__(self), self, args, kwargs)

    return patched


def scoped_by_hand(function: Callable[..., Any], covered: set[int]) -> Callable[..., Any]:
    """A hand-written alternative to a patch of a method for some objects."""

    @functools.wraps(function)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in covered:
            return passing(function.__get__(self), self, args, kwargs)
        return function(self, *args, **kwargs)

    return patched


def declare(path: str, **checks: Any) -> patches.Patch:
    """Declare a patch of something in this file."""
    name = path.lower().replace(".", "-")
    return patches.Patch(
        id=f"bench.{name}", target=f"{__name__}:{path}", wrapper=passing, reason="a benchmark", **checks
    )


def checked() -> patches.Patch:
    """Declare a patch with every check: versions, fingerprint, signature, no foreign patch, effect."""
    fingerprint = patches.fingerprint_of(declare("Thing.run"))
    checks = {"signature": "(self, x)", "on_foreign": "error", "verify": lambda: None, "requires": {"wrapt": ">=1"}}
    return declare("Thing.run", fingerprint=fingerprint, **checks)


def medians(functions: Sequence[Callable[[], Any]], repeat: int) -> list[float]:
    """Median seconds per call of each function. Measured in turns, so that load on the machine affects all alike."""
    samples: list[list[float]] = [[] for _ in functions]
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for taken, function in zip(samples, functions, strict=True):
                taken.append(_seconds(function, repeat))
    finally:
        gc.enable()
    return [statistics.median(taken) for taken in samples]


def _seconds(function: Callable[[], Any], repeat: int) -> float:
    started = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - started) / repeat


def measure_calls() -> list[Row]:
    """Measure calls of patched functions and methods against hand-written closures, in the same rounds."""
    stock, method = add, vars(Thing)["run"]
    by_hand = function_by_hand(stock)
    bare: Any = wrapt.FunctionWrapper(math.floor, passing)
    things = [Thing() for _ in range(2000)]
    hand = type("Hand", (), {"run": method_by_hand(method), "scoped": scoped_by_hand(method, {id(things[0])})})()
    covered = scoped_by_hand(method, {id(things[0]), id(things[1])})
    scopes = [patches.on(declare("Thing.two"), things[:2]), patches.on(declare("Thing.many"), things)]
    with patches.transaction(declare("add"), declare("Thing.run"), declare("floor"), *scopes, reason="a benchmark"):
        thing, other = things[0], Thing()
        pairs: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = [
            ("function", lambda: add(1), lambda: by_hand(1), 1.3),
            ("method", lambda: thing.run(1), lambda: hand.run(1), 1.3),
            ("method of 2 objects", lambda: thing.two(1), lambda: covered(thing, 1), 1.6),
            ("method of 2,000 objects", lambda: thing.many(1), lambda: thing.two(1), 1.2),
            ("method of other objects", lambda: other.two(1), lambda: hand.scoped(1), 1.8),
            ("function of C", lambda: floor(1), lambda: bare(1), 1.6),
        ]
        taken = medians([lambda: stock(1), *(call for _, *calls, _ in pairs for call in calls)], CALLS)
    original = taken.pop(0)
    return [
        _ratio(what, ours, theirs, original, limit)
        for (what, *_, limit), ours, theirs in zip(pairs, taken[::2], taken[1::2], strict=True)
    ]


def _ratio(what: str, ours: float, theirs: float, original: float, limit: float) -> Row:
    against = f"{ours * 1e9:.0f} and {theirs * 1e9:.0f} ns; a plain function takes {original * 1e9:.0f} ns"
    hand = "bare wrapt" if what.endswith("of C") else "method of 2" if "2,000" in what else "by hand"
    return Row(what=f"{what} / {hand}", value=ours / theirs, unit="x", against=against, limit=limit)


def measure_undo() -> Row:
    """Look whether undo has put back the very objects."""
    before = add, vars(Thing)["run"], floor
    with patches.transaction(declare("add"), declare("Thing.run"), declare("floor"), reason="a benchmark"):
        pass
    others = sum(one is not other for one, other in zip(before, (add, vars(Thing)["run"], floor), strict=True))
    return Row(what="after undo, other objects than before", value=others, unit="", against="", limit=0)


def measure_applying() -> Row:
    """Measure applying and undoing a patch with all checks, its fingerprint cached, against wrapt's wrap and unwrap."""
    patch = checked()

    def ours() -> None:
        with patches.transaction(patch, reason="a benchmark"):
            pass

    def theirs() -> None:
        handle = wrapt.wrap_object(Thing, "run", wrapt.FunctionWrapper, (passing,))
        wrapt.unwrap_object(Thing, "run", handle)

    apply, wrap = medians([ours, theirs], 200)
    against = f"{apply * 1e6:.0f} and {wrap * 1e6:.1f} microseconds"
    return Row(what="apply and undo / wrapt wrap and unwrap", value=apply / wrap, unit="x", against=against, limit=100)


def measure_import() -> Row:
    """Measure `import patches` in a new process, minus `import wrapt` in another, in seconds of the processor."""
    program = "import time; s = time.process_time(); import {}; print(time.process_time() - s)"
    samples: dict[str, list[float]] = {"wrapt": [], "patches": []}
    for _ in range(IMPORTS):
        for modules, taken in samples.items():
            command = [sys.executable, "-c", program.format(modules)]
            taken.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    wrapt_alone, ours = (1000 * statistics.median(taken) for taken in samples.values())
    against = f"{ours:.0f} and {wrapt_alone:.0f} ms"
    return Row(
        what="import patches above import wrapt", value=ours - wrapt_alone, unit=" ms", against=against, limit=60
    )


def main(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Take all measurements, and exit with 1 if one exceeds its limit."""
    rows = [*measure_calls(), measure_undo(), measure_applying(), measure_import()]
    if as_json:
        print(json.dumps([{**asdict(row), "within": row.within} for row in rows], indent=2))
    else:
        for row in rows:
            mark = "ok  " if row.within else "OVER"
            print(
                f"{mark}  {row.what:39}  {row.value:6.2f}{row.unit:3}  limit {row.limit:g}{row.unit:3}  {row.against}"
            )
    if not all(row.within for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
