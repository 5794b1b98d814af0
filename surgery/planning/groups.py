"""Which ranks are alike, so that each kind is planned once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["RankClass", "classify"]


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """Ranks that keep as many rows of every tensor as each other.

    ranks: in order. typical: the one that reads most; the others read less by a block a tensor at most.
    """

    ranks: tuple[int, ...]
    typical: int

    @property
    def label(self) -> str:
        """`rank 0`, `ranks 1-7`, `ranks 0-15, 32`."""
        runs = _runs(self.ranks)
        said = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:3])
        more = ", ..." if len(runs) > 3 else ""
        return f"rank{'s' if len(self.ranks) > 1 else ''} {said}{more}"


def classify(inventory: Inventory, setting: Setting) -> tuple[RankClass, ...]:
    """The classes, by their first rank."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(setting.world_size):
        found.setdefault(_likeness(inventory, setting, rank), []).append(rank)
    return tuple(
        RankClass(ranks=tuple(ranks), typical=max(ranks, key=lambda rank: _elements_read(inventory, setting, rank)))
        for ranks in found.values()
    )


def _likeness(inventory: Inventory, setting: Setting, rank: int) -> tuple[int, ...]:
    loading, shards = setting.loading, setting.sharding.shards
    rows = [len(loading.slice(form, rank).reads) for form, _ in inventory.forms]
    heights = sorted({rows for unit in inventory.units for rows, _ in unit.adapters})
    adapters = [
        len(range(height)[(rank % shards) * -(-height // shards) :][: -(-height // shards)]) for height in heights
    ]
    is_first = int(rank == 0 and setting.placement == "rank0-cpu")
    return (is_first, *rows, *adapters)


def _elements_read(inventory: Inventory, setting: Setting, rank: int) -> int:
    loading = setting.loading
    return sum(count * len(loading.slice(form, rank).elements) for (form, _), count in inventory.forms.items())


def _runs(ranks: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for rank in ranks:
        if not runs or runs[-1][-1] != rank - 1:
            runs.append([])
        runs[-1].append(rank)
    return runs
