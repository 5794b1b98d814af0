"""Summary of one way over its ranks and turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from loading.outcome import Load, Outcome, Training

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Summary of one way: the worst rank, but mean losses; the median turn, but peak memory.

    ready: seconds of each turn. phases: name -> seconds, of the slowest rank in the median turn.
    hosts, pinned, device, held: maximum over ranks and turns, in bytes; `hosts` by rank, since rank 0 may differ.
    """

    way: str
    error: str | None
    ready: tuple[float, ...] = ()
    phases: dict[str, float] | None = None
    hosts: tuple[int, ...] = ()
    pinned: int = 0
    device: int = 0
    held: int = 0
    late_imports: int = 0
    first_step: float | None = None
    median_step: float | None = None
    train_device: int = 0
    losses: tuple[float, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Seconds until ready, in the median turn."""
        return median(self.ready) if self.ready else None


def summarize(way: str, outcomes: Sequence[Outcome]) -> Summary:
    """Summarize the outcomes of `way`."""
    mine = [outcome for outcome in outcomes if outcome.way == way]
    error = next((outcome.error for outcome in _own_errors_first(mine) if outcome.error), None)
    loads = [(outcome, outcome.load) for outcome in mine if outcome.load is not None]
    if not loads:
        return Summary(way=way, error=error)
    turns = sorted({outcome.turn for outcome in mine})
    by_turn = {turn: [load for outcome, load in loads if outcome.turn == turn] for turn in turns}
    ready = {turn: max(load.ready for load in found) for turn, found in by_turn.items() if found}
    trainings = [[each.training for each in mine if each.turn == turn and each.training] for turn in turns]
    training = _training_fields([found for found in trainings if found])
    middle = sorted(ready, key=lambda turn: ready[turn])[(len(ready) - 1) // 2]
    slowest = max(by_turn[middle], key=lambda load: load.seconds)
    return Summary(
        way=way,
        error=error,
        ready=tuple(ready.values()),
        phases={name: seconds for name, (_, seconds) in slowest.phases.items()},
        hosts=tuple(
            max(load.host for outcome, load in loads if outcome.rank == rank)
            for rank in sorted({outcome.rank for outcome, _ in loads})
        ),
        pinned=_most(loads, lambda load: load.pinned),
        device=_most(loads, lambda load: load.device),
        held=_most(loads, lambda load: load.held),
        late_imports=_most(loads, lambda load: load.late_imports),
        **training,
    )


def _most(loads: Sequence[tuple[Outcome, Load]], value: Callable[[Load], int]) -> int:
    return max(value(load) for _, load in loads)


def _own_errors_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Sort outcomes so that ranks with an error of their own come before ranks that were only stopped."""
    return sorted(outcomes, key=lambda outcome: "torchrun" in (outcome.error or "torchrun"))


def _training_fields(turns: Sequence[Sequence[Training]]) -> dict[str, Any]:
    """The training fields of a summary, from the ranks of each turn; losses are those of the first turn."""
    if not turns:
        return {}
    return {
        "first_step": median(max(training.first for training in ranks) for ranks in turns),
        "median_step": median(max(training.median for training in ranks) for ranks in turns),
        "train_device": max(training.device for ranks in turns for training in ranks),
        "losses": tuple(fmean(losses) for losses in zip(*(training.losses for training in turns[0]), strict=True)),
    }
