"""Measurements of one way on one rank."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

__all__ = ["Journal", "Load", "Outcome", "Training", "collect", "describe"]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Cost of getting from an open process group to a model ready to train, without imports, in seconds and bytes.

    seconds: of this rank. ready: until the last rank was ready. phases: name -> (start, seconds); phases of different
    threads overlap. host: peak of anonymous memory above that at the start. pinned: peak of page-locked memory.
    device: peak allocated by torch on the GPU. held: allocated on the GPU when ready. bytes_read: counted by our
    reader; 0 in the other ways. late_imports: number of modules that were imported nevertheless.
    """

    seconds: float
    ready: float
    phases: dict[str, tuple[float, float]]
    host: int
    pinned: int
    device: int
    held: int
    bytes_read: int
    late_imports: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training steps: losses (of this rank's sequence, or of all, as the loop reports), seconds, peak GPU memory."""

    losses: list[float]
    seconds: list[float]
    device: int

    @property
    def first(self) -> float:
        """Seconds of the first step, which includes setup."""
        return self.seconds[0]

    @property
    def median(self) -> float:
        """Median seconds of the other steps; of the first, if there is no other."""
        return median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one turn on one rank: an error, or the measurements; both if training has failed."""

    way: str
    turn: int
    rank: int
    error: str | None = None
    load: Load | None = None
    training: Training | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """Restore an outcome from the result of `dataclasses.asdict`."""
        load, training = values["load"], values["training"]
        if load is not None:
            phases = {name: tuple(span) for name, span in load["phases"].items()}
            load = Load(**{**load, "phases": phases})
        return cls(**{**values, "load": load, "training": training and Training(**training)})


@dataclass(kw_only=True)
class Journal:
    """The outcomes of one rank, in a file of its own in `folder`, rewritten after each."""

    folder: Path
    rank: int
    _outcomes: list[dict[str, Any]] = field(default_factory=list, init=False)

    def add(self, outcome: Outcome) -> None:
        """Write an outcome, replacing an earlier one of the same turn."""
        values = asdict(outcome)
        others = [each for each in self._outcomes if (each["way"], each["turn"]) != (outcome.way, outcome.turn)]
        self._outcomes = [*others, values]
        file = self.folder / f"rank-{self.rank}.json"
        file.write_text(json.dumps(self._outcomes), encoding="utf-8")


def collect(folder: Path) -> list[Outcome]:
    """The outcomes of all journals in `folder`."""
    files = sorted(folder.glob("rank-*.json"))
    return [Outcome.from_dict(each) for file in files for each in json.loads(file.read_text(encoding="utf-8"))]


def describe(error: BaseException) -> str:
    """An error as a result: want of memory, if that is behind it, or its type and text."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, torch.OutOfMemoryError):
            return "out of memory"
        found = found.__cause__
    return f"{type(error).__name__}: {error}"[:300]
