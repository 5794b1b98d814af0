"""Ranks that are alike, so that each kind is planned once; and the bytes that a rank reads."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from surgery.passes.setting import Setting
from surgery.planning.inventory import Inventory
from surgery.sharding.partition import Form, Partition, chunk

__all__ = ["RankClass", "bytes_read", "classify", "read_once_per_node"]


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """Ranks that keep as many rows of every tensor as each other.

    ranks: in order. typical: one that reads most; the others read less by a block a tensor at most.
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


def _runs(ranks: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for rank in ranks:
        if not runs or runs[-1][-1] != rank - 1:
            runs.append([])
        runs[-1].append(rank)
    return runs


#: A position of a rank in a grid: `rank // over % below`.
Axis = tuple[int, int]


def classify(inventory: Inventory, setting: Setting) -> tuple[RankClass, ...]:
    """The classes, by their first rank.

    Rows fall along an axis in two or three steps, so that a tensor is looked at on a few ranks, and not on all.
    """
    axes = [(over, below, sorted(steps)) for (over, below), steps in _steps(inventory, setting).items()]
    cells: dict[tuple[int, ...], list[int]] = {}
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(setting.world_size):
        cell = tuple([bisect_right(steps, rank // over % below) for over, below, steps in axes])
        if cell not in cells:
            cells[cell] = found.setdefault(_likeness(inventory, setting, rank), [])
        cells[cell].append(rank)
    # How much is rounded out to whole blocks repeats itself after so many ranks.
    period = max((target.layout.blocksize for target in inventory.targets if target.layout is not None), default=1)
    return tuple(
        RankClass(
            ranks=tuple(ranks), typical=max(ranks[:period], key=lambda rank: _elements_read(inventory, setting, rank))
        )
        for ranks in found.values()
    )


def _steps(inventory: Inventory, setting: Setting) -> dict[Axis, set[int]]:
    """The positions on each axis from which on ranks keep or read another number of rows."""
    partition, at_rest = setting.strategy.partition, setting.strategy.at_rest
    found: dict[Axis, set[int]] = defaultdict(set)
    found[1, setting.world_size] = {1}  # rank 0 may be given what others have
    for form in inventory.forms:
        grid = partition.grid_of(form)
        kept = _falls(grid.shards, partial(_rows_kept, partition, form))
        found[1, grid.shards].update(kept)
        for shard in {0, *kept}:
            reads = _falls(grid.replicas, partial(_rows_read, partition, form, shard))
            found[grid.shards, grid.replicas].update(reads)
    for rows in _heights(inventory):
        found[1, at_rest.shards].update(_falls(at_rest.shards, partial(_adapter_rows, rows, at_rest.shards)))
    return found


def _rows_kept(partition: Partition, form: Form, rank: int) -> int:
    return len(partition.slice(form, rank).keeps)


def _rows_read(partition: Partition, form: Form, shard: int, replica: int) -> int:
    return len(partition.slice(form, replica * partition.grid_of(form).shards + shard).reads)


def _falls(count: int, size: Callable[[int], int]) -> list[int]:
    """The positions below `count` at which `size`, which never rises, is less than before, by bisection."""
    found: list[int] = []
    at = 0
    while at < count:
        at = bisect_left(range(count), 1 - size(at), lo=at, key=lambda position: -size(position))
        found.append(at)
    return [position for position in found if position < count]


def _heights(inventory: Inventory) -> list[int]:
    return sorted({rows for unit in inventory.units for rows, _ in unit.adapters})


def _adapter_rows(rows: int, shards: int, position: int) -> int:
    return len(chunk(range(rows), shards, position))


def _likeness(inventory: Inventory, setting: Setting, rank: int) -> tuple[int, ...]:
    strategy = setting.strategy
    rows = [len(strategy.partition.slice(form, rank).reads) for form in inventory.forms]
    shards = strategy.at_rest.shards
    adapters = [_adapter_rows(height, shards, rank % shards) for height in _heights(inventory)]
    return (int(strategy.devices(rank) != strategy.devices(setting.world_size - 1)), *rows, *adapters)


def _elements_read(inventory: Inventory, setting: Setting, rank: int) -> int:
    partition = setting.strategy.partition
    return sum(count * len(partition.slice(form, rank).elements) for form, count in inventory.forms.items())


def bytes_read(inventory: Inventory, setting: Setting, rank: int) -> int:
    """Bytes that `rank` reads of tensors that map to one parameter each; a copy under a tied name is compared."""
    partition = setting.strategy.partition
    total = 0
    for target in inventory.targets:
        if target.source is not None:
            elements = len(partition.slice(target.form, rank).elements)
            total += elements * target.source.dtype.itemsize * (1 + len(target.assignment.duplicates))
    return total


def read_once_per_node(inventory: Inventory) -> tuple[str, ...]:
    """Checkpoint keys that upstream's conversion merges or splits, or that are held transposed, in order."""
    found = (key for target in inventory.targets if target.source is None for key in target.assignment.sources)
    return tuple(dict.fromkeys(found))
