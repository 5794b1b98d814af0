"""Measurements of a way and a batch, as a line of JSON, a row, and a bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from loading.bars import Bar, Panel, draw
from loading.batches import Batch
from loading.tables import table

__all__ = ["Found", "chart", "read", "tables", "write"]

GIB = 1024**3


@dataclass(kw_only=True)
class Found:
    """Measurements of one way on one batch, or on none if it did not load; sizes in bytes, of the rank with most.

    ready: seconds from an open process group to a model and its optimizer. held: of the GPU when ready. turns: seconds
    of every step by turn, of the slowest rank. losses: of all steps, means over ranks. busy: seconds of the GPU in one
    profiled step; useful: without NCCL's kernels. longest: tokens of the longest sequence that trains.
    """

    way: str
    ranks: int
    batch: str | None
    memory_cap: float | None
    environment: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    ready: float = 0.0
    held: int = 0
    adapters: str = ""
    turns: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    reserved: int = 0
    busy: float | None = None
    useful: float | None = None
    launches: int | None = None
    longest: int | None = None

    def add(self, answers: Sequence[dict[str, Any]]) -> str | None:
        """Add the answers of all ranks to one command; returns the error that is among them."""
        self.error = next((each["error"] for each in answers if "error" in each), None)
        for name in ("ready", "held", "peak", "reserved", "longest"):
            if found := [each[name] for each in answers if name in each]:
                setattr(self, name, max(getattr(self, name) or 0, *found))
        for name in ("adapters", "busy", "useful", "launches"):
            setattr(self, name, answers[0].get(name, getattr(self, name)))
        if all("seconds" in each for each in answers):
            self.turns.append([max(ranks) for ranks in zip(*(each["seconds"] for each in answers), strict=True)])
            self.losses += [fmean(ranks) for ranks in zip(*(each["losses"] for each in answers), strict=True)]
        return self.error

    @property
    def label(self) -> str:
        """The way, and what is particular to its machine."""
        cap = f" in {self.memory_cap:g} GiB" if self.memory_cap else ""
        return f"{self.way}{f' on {self.ranks}' if self.ranks > 1 else ''}{cap}"

    @property
    def first(self) -> float | None:
        """Seconds of the first step."""
        return self.turns[0][0] if self.turns else None

    @property
    def steady(self) -> list[float]:
        """Seconds of steps, but for the first three of all, and the first of each turn, which allocates anew."""
        return [second for number, turn in enumerate(self.turns) for second in turn[1 if number else 3 :]]

    @property
    def step(self) -> float | None:
        """Median seconds of a step."""
        return median(self.steady or self.turns[0]) if self.turns else None

    def line(self) -> str:
        """One line of JSON, with what follows from the rest beside it."""
        step = self.step
        more: dict[str, Any] = {"first": self.first, "step": step}
        if step:
            more["tokens_per_second"] = round(self.tokens / step)
            more["busy_share"] = self.busy and round(self.busy / step, 3)
        return json.dumps(asdict(self) | more)

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all ranks."""
        if self.batch is None:
            return 0
        batch = Batch.of(self.batch)
        return batch.sequences * batch.tokens * self.ranks


def write(file: Path, found: Sequence[Found]) -> None:
    """Write a line for each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(each.line() + "\n" for each in found), encoding="utf-8")


def read(files: Sequence[Path]) -> list[Found]:
    """Read what `write` has written."""
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Found(**{name: line[name] for name in Found.__dataclass_fields__ if name in line}) for line in lines]


def tables(found: Sequence[Found]) -> str:
    """The environment, and a table for each batch; a relative time is to the first way of its table."""
    environments = {json.dumps(each.environment): each.environment for each in found}.values()
    parts = [", ".join(f"{name} {version}" for name, version in each.items()) for each in environments]
    for batch in dict.fromkeys(each.batch for each in found):
        mine = [each for each in found if each.batch == batch]
        parts += [f"{batch or 'Not measured'}:", _table(mine)]
    return "\n\n".join(parts)


def _table(found: Sequence[Found]) -> str:
    head = ["way", "step, s", "relative", "GPU busy, s", "share", "launches", "peak, GiB", "reserved, GiB"]
    head += ["tokens/s", "first step, s", "ready, s", "first loss", "last loss"]
    base = next((each.step for each in found if each.step), None)
    return table(head, [_row(each, base) for each in found])


def _row(found: Found, base: float | None) -> tuple[str, ...]:
    step = found.step
    if step is None:
        longest = f"{found.longest} tokens at most" if found.longest is not None else None
        return (found.label, found.error or longest or "nothing")
    kernels = ("", "", "")
    if found.busy is not None:
        kernels = (f"{found.busy:.4f}", f"{found.busy / step:.0%}", str(found.launches))
    return (
        found.label,
        f"{step:.4f}" + (f" ({found.error})" if found.error else ""),
        f"{step / base:.2f}" if base else "",
        *kernels,
        f"{found.peak / GIB:.2f}" if found.peak else "",
        f"{found.reserved / GIB:.2f}" if found.reserved else "",
        f"{found.tokens / step:,.0f}",
        f"{found.first:.2f}",
        f"{found.ready:.1f}",
        f"{found.losses[0]:.5f}",
        f"{found.losses[-1]:.5f}",
    )


def chart(found: Sequence[Found]) -> str:
    """Draw steps and peaks of every batch, as SVG."""
    panels = []
    for batch in dict.fromkeys(each.batch for each in found if each.batch):
        mine = [each for each in found if each.batch == batch]
        steps = [_bar(each, each.step, (min(each.steady), max(each.steady)) if each.steady else None) for each in mine]
        peaks = [_bar(each, each.peak / GIB if each.peak else None, None) for each in mine]
        panels += [
            Panel(title=f"{batch}: median step, seconds (line: least to most)", shown="{:.3f} s", bars=steps),
            Panel(title=f"{batch}: peak of the GPU, GiB", shown="{:.2f} GiB", bars=peaks),
        ]
    return draw("A training step in several ways", panels)


def _bar(found: Found, value: float | None, spread: tuple[float, float] | None) -> Bar:
    note = "none" if found.error is None else found.error.split(":")[0]
    return Bar(label=found.label, ours=found.way.startswith("ours"), value=value, spread=spread, note=note)
