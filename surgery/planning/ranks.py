"""Classes of ranks that are alike, each planned once, and the figures of a plan for one rank."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from surgery.passes.loading import wanted
from surgery.passes.setting import Setting
from surgery.planning.inventory import Inventory
from surgery.sharding.partition import Form, Partition, chunk

__all__ = ["Memory", "Peaks", "RankClass", "RankPlan", "Step", "bytes_read", "classify", "read_once_per_node"]


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

    def elements_read(rank: int) -> int:
        slices = ((setting.strategy.partition.slice(form, rank), count) for form, count in inventory.forms.items())
        return sum(count * len(each.elements) for each, count in slices)

    return tuple(RankClass(ranks=tuple(r), typical=max(r[:period], key=elements_read)) for r in found.values())


def _steps(inventory: Inventory, setting: Setting) -> dict[Axis, set[int]]:
    """The positions on each axis at which the number of rows that a rank keeps or reads changes."""
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


def bytes_read(inventory: Inventory, setting: Setting, rank: int) -> int:
    """Bytes that `rank` reads of its ranges of tensors; a copy under a tied name is compared."""
    partition = setting.strategy.partition
    total = 0
    for target in inventory.targets:
        ranges = wanted(target, partition.slice(target.form, rank))
        read = sum(each.nbytes for each in ranges)
        total += read * (1 + len(target.assignment.duplicates))
        total += 0 if target.stored is None else target.stored.shared_bytes
    return total


def read_once_per_node(inventory: Inventory) -> tuple[str, ...]:
    """Checkpoint keys that upstream's conversion splits or permutes, or that are held transposed, in order."""
    converted = [each for each in inventory.targets if not each.segments and each.statistics_of is None]
    return tuple(dict.fromkeys(key for target in converted for key in target.assignment.sources))


@dataclass(kw_only=True)
class Peaks:
    """Maxima over moments that are noted one after the other, in bytes.

    host, device: of each. anonymous: of the host without what is pinned. both: of host and device together.
    """

    host: int = 0
    anonymous: int = 0
    device: int = 0
    both: int = 0

    def note(self, *, host: int, device: int, pinned: int = 0) -> None:
        """Note a moment at which so many bytes are held; `pinned` is part of `host`."""
        self.host = max(self.host, host)
        self.anonymous = max(self.anonymous, host - pinned)
        self.device = max(self.device, device)
        self.both = max(self.both, host + device)

    def memory(self, *, host_held: int, device_held: int, on_cpu: bool) -> Memory:
        """The figures of a phase with these peaks, at whose end so much is held."""
        if on_cpu:
            held = host_held + device_held
            return Memory(host_held=held, host_peak=self.both, anonymous_peak=self.both, device_held=0, device_peak=0)
        return Memory(
            host_held=host_held,
            host_peak=self.host,
            anonymous_peak=self.anonymous,
            device_held=device_held,
            device_peak=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes held at the end of loading, and the peak before. Where ranks compute on a CPU, all is the host's.

    anonymous_peak: of the host without buffers for a GPU: the driver maps these, so that the anonymous memory of the
    process, which a report measures, does not have them.
    """

    host_held: int
    host_peak: int
    anonymous_peak: int
    device_held: int
    device_peak: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step at its worst moment; the peaks are sums of the fields before them.

    weights, quant_state, adapters, gradients, optimizer: held between steps.
    gathered: what the sharding has whole then. dequantized: the weight of a quantized layer while it multiplies.
    activations: an estimate, from the shapes of the linear layers, for attention that keeps no scores. logits: with
        their gradients.
    recorded: what CUDA graphs take beside all that.
    offloaded: inputs of recomputed blocks that wait in pinned memory of the host; no row before has them.
    on_host: what of the rows before waits on the CPU (with cpu_offload), and so is no part of the device's peak.
    moment: "loss" or "backward".
    """

    weights: int
    quant_state: int
    adapters: int
    gradients: int
    optimizer: int
    gathered: int
    dequantized: int
    activations: int
    logits: int
    recorded: int
    offloaded: int
    on_host: int
    host_peak: int
    device_peak: int
    moment: str


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """The figures of one rank. train: None if only loading was planned.

    bytes_read: from the checkpoint, without what one rank of each node reads for the others.
    """

    bytes_read: int
    load: Memory
    train: Step | None

    @property
    def device_peak(self) -> int:
        """Device peak over loading and training."""
        return max(self.load.device_peak, self.train.device_peak if self.train is not None else 0)

    @property
    def host_peak(self) -> int:
        """Host peak over loading and training."""
        return max(self.load.host_peak, self.train.host_peak if self.train is not None else 0)
