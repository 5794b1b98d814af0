"""Measure the cost of a patched call, of applying and undoing a patch, and of importing the package, as medians."""

from __future__ import annotations

import functools
import gc
import json
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

CALLS = 50_000
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


class Traced:
    """Class to patch as code that torch.compile traces."""

    def run(self, x: int) -> int:
        """Do almost nothing, so that the overhead dominates."""
        return x


class Wrapped:
    """Class to patch as any other code."""

    def run(self, x: int) -> int:
        """Do almost nothing, so that the overhead dominates."""
        return x


def passing(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the original: the body of every wrapper here."""
    return wrapped(*args, **kwargs)


def closure_around(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hand-written alternative to a patch: a closure that calls the same wrapper body."""

    @functools.wraps(function)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return passing(function.__get__(self), self, args, kwargs)

    return patched


def declare(patch_id: str, cls: type, *, traced: bool) -> patches.Patch:
    """Declare a patch with every check: fingerprint, signature, no foreign patch."""
    declared: dict[str, Any] = {"id": patch_id, "target": f"{__name__}:{cls.__name__}.run", "reason": "a benchmark"}
    bare = patches.Patch(**declared, wrapper=passing)
    return patches.Patch(
        **declared,
        wrapper=passing,
        traced=traced,
        requires={"wrapt": ">=1"},
        fingerprint=patches.fingerprint_of(bare),
        signature="(self, x)",
        on_foreign="error",
        verify=lambda: None,
    )


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
    """Measure calls of a patched method, of its alternatives, and of the original."""
    by_hand = type("ByHand", (), {"run": closure_around(vars(Traced)["run"])})()
    bare = type("Bare", (), {"run": wrapt.FunctionWrapper(vars(Wrapped)["run"], passing)})()
    plain = type("Plain", (), {"run": vars(Wrapped)["run"]})()
    original = vars(Traced)["run"], vars(Wrapped)["run"]
    both = declare("bench.traced", Traced, traced=True), declare("bench.wrapped", Wrapped, traced=False)
    with patches.transaction(*both, reason="a benchmark"):
        traced, wrapped = Traced(), Wrapped()
        stock, closure, ours_traced, bare_wrapt, ours_wrapt = medians(
            [
                lambda: plain.run(1),
                lambda: by_hand.run(1),
                lambda: traced.run(1),
                lambda: bare.run(1),
                lambda: wrapped.run(1),
            ],
            CALLS,
        )
    unchanged = all(
        one is other for one, other in zip(original, (vars(Traced)["run"], vars(Wrapped)["run"]), strict=True)
    )
    return [
        _ratio("traced patch / closure by hand", ours_traced, closure, stock, 1.3),
        _ratio("wrapt patch / bare FunctionWrapper", ours_wrapt, bare_wrapt, stock, 1.2),
        Row(what="after undo, other objects than before", value=float(not unchanged), unit="", against="", limit=0),
    ]


def _ratio(what: str, ours: float, theirs: float, stock: float, limit: float) -> Row:
    against = f"{ours / stock:.1f} and {theirs / stock:.1f} times the original, which takes {stock * 1e9:.0f} ns"
    return Row(what=what, value=ours / theirs, unit="x", against=against, limit=limit)


def measure_applying() -> Row:
    """Measure applying and undoing a patch with all checks, its fingerprint cached, against wrapt's wrap and unwrap."""
    patch = declare("bench.apply", Wrapped, traced=False)

    def ours() -> None:
        with patches.transaction(patch, reason="a benchmark"):
            pass

    def theirs() -> None:
        handle = wrapt.wrap_object(Wrapped, "run", wrapt.FunctionWrapper, (passing,))
        wrapt.unwrap_object(Wrapped, "run", handle)

    apply, wrap = medians([ours, theirs], 200)
    against = f"{apply * 1e6:.0f} and {wrap * 1e6:.1f} microseconds"
    return Row(what="apply and undo / wrapt wrap and unwrap", value=apply / wrap, unit="x", against=against, limit=100)


def measure_import() -> Row:
    """Measure `import patches` in a new process, minus `import wrapt`."""
    program = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"
    samples: dict[str, list[float]] = {"wrapt": [], "wrapt, patches": []}
    for _ in range(IMPORTS):
        for modules, taken in samples.items():
            command = [sys.executable, "-c", program.format(modules)]
            taken.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    wrapt_alone, both = (1000 * statistics.median(taken) for taken in samples.values())
    against = f"{both:.0f} and {wrapt_alone:.0f} ms"
    return Row(
        what="import patches above import wrapt", value=both - wrapt_alone, unit=" ms", against=against, limit=60
    )


def main(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Take all measurements, and exit with 1 if one exceeds its limit."""
    rows = [*measure_calls(), measure_applying(), measure_import()]
    if as_json:
        print(json.dumps([{**asdict(row), "within": row.within} for row in rows], indent=2))
    else:
        for row in rows:
            mark = "ok  " if row.within else "OVER"
            print(
                f"{mark}  {row.what:40}  {row.value:6.2f}{row.unit:3}  limit {row.limit:g}{row.unit:3}  {row.against}"
            )
    if not all(row.within for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
