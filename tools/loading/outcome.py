"""What was measured of one way, on one rank."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Journal", "Load", "Outcome", "Training", "collect"]


@dataclass(frozen=True, kw_only=True)
class Load:
    """From an open process group to a model that is ready to train, imports apart. Seconds and bytes.

    seconds: of this rank. ready: until the last rank was ready. phases: name -> (start, seconds); those of two threads
    overlap. host: the most anonymous memory above what there was before. pinned: the most pages locked for the GPU.
    device: the most that torch had allocated on the GPU. held: what it had when all was ready.
    bytes_read: counted by our reader; 0 in the other ways. late_imports: modules that were imported all the same.
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
    """Steps: their losses (of this rank's sequence, or of all where the loop says so), seconds, and peak of the GPU."""

    losses: list[float]
    seconds: list[float]
    device: int

    @property
    def first(self) -> float:
        """Seconds of the first step, in which much is set up."""
        return self.seconds[0]

    @property
    def median(self) -> float:
        """Seconds of the others; of the first, if there is no other."""
        return median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one turn on one rank: an error, or what is measured; both, if training has failed."""

    way: str
    turn: int
    rank: int
    error: str | None = None
    load: Load | None = None
    training: Training | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """What `dataclasses.asdict` gave."""
        load, training = values["load"], values["training"]
        if load is not None:
            phases = {name: tuple(span) for name, span in load["phases"].items()}
            load = Load(**{**load, "phases": phases})
        return cls(**{**values, "load": load, "training": training and Training(**training)})


@dataclass(kw_only=True)
class Journal:
    """The outcomes of one rank, in a file of its own in `folder` that is whole after each of them."""

    folder: Path
    rank: int
    _outcomes: list[dict[str, Any]] = field(default_factory=list, init=False)

    def add(self, outcome: Outcome) -> None:
        """Write it down, in the place of an earlier one of the same turn."""
        values = asdict(outcome)
        others = [each for each in self._outcomes if (each["way"], each["turn"]) != (outcome.way, outcome.turn)]
        self._outcomes = [*others, values]
        file = self.folder / f"rank-{self.rank}.json"
        file.write_text(json.dumps(self._outcomes), encoding="utf-8")


def collect(folder: Path) -> list[Outcome]:
    """What all journals in `folder` say."""
    files = sorted(folder.glob("rank-*.json"))
    return [Outcome.from_dict(each) for file in files for each in json.loads(file.read_text(encoding="utf-8"))]
