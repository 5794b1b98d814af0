"""What one rank reads, holds and peaks at while it loads: a walk through the layers, as the passes go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from surgery.distributed.collect import RUN_BYTES
from surgery.loading import Staging
from surgery.passes.base import Layer
from surgery.planning.adapted import adapter_host_peak, adapter_shards
from surgery.planning.allowances import (
    ADAPTED_MODULE_BYTES,
    CPU_QUANTIZE_BYTES,
    CUDA_QUANTIZE_BYTES,
    HOST_BYTES,
    MODULE_BYTES,
)
from surgery.planning.figures import Memory
from surgery.planning.inventory import Inventory, row_bytes
from surgery.planning.setting import Setting
from surgery.planning.statistics import STATISTIC_BYTES, quant_state_bytes
from surgery.planning.wrapping import wrap
from surgery.slices import Slice
from surgery.targets import Target

__all__ = ["bytes_read", "plan_load", "read_once_per_node"]


def read_once_per_node(inventory: Inventory) -> tuple[str, ...]:
    """Checkpoint keys that upstream's conversion merges or splits, or that are held transposed, in order."""
    found = (key for target in inventory.targets if target.source is None for key in target.assignment.sources)
    return tuple(dict.fromkeys(found))


def bytes_read(inventory: Inventory, setting: Setting, rank: int) -> int:
    """What `rank` reads of tensors that map to one parameter each; a copy under a tied name is read to be compared."""
    total = 0
    for target in inventory.targets:
        if target.source is not None:
            elements = setting.loading.slice(target.form, rank).elements
            total += len(elements) * target.source.dtype.itemsize * (1 + len(target.assignment.duplicates))
    return total


def plan_load(
    inventory: Inventory, setting: Setting, staging: Staging, layers: Sequence[Layer], rank: int
) -> Memory:
    """The figures of `rank`. `layers` are those that the passes will visit."""
    walk = _Walk(inventory=inventory, setting=setting, staging=staging, rank=rank)
    for layer in layers:
        walk.visit(layer)
    return walk.finish()


@dataclass(kw_only=True)
class _Walk:
    """device, host: bytes of parts held so far, by where they wait."""

    inventory: Inventory
    setting: Setting
    staging: Staging
    rank: int
    device: int = 0
    host: int = 0
    state: int = 0
    device_peak: int = 0
    host_peak: int = 0

    def visit(self, layer: Layer) -> None:
        """Load, exchange, place."""
        made = 0
        for target in layer.targets:
            size = self._capacity(target)
            if self._is_made_on_host(target):
                self.host += size
            else:
                made += size
        quantized = [target for target in layer.targets if target.is_quantized]
        self._note(made + self._filling(layer), converted=self._converted(layer))
        self._note(made + self._exchanging(quantized))
        self.state += quant_state_bytes(quantized, self.setting.quant)
        self._place(made, quantized)

    def finish(self) -> Memory:
        """After the last layer: adapters are there, and what FSDP makes of all of it."""
        setting, inventory = self.setting, self.inventory
        staged = _staging_bytes(self.staging, inventory)
        objects = HOST_BYTES + _object_bytes(inventory)
        adapters_held = adapter_shards(inventory, setting, self.rank)
        wrapped = wrap(inventory, setting, rank=self.rank, loaded=self.device + self.host)
        offloaded = wrapped.held if setting.cpu_offload else 0
        return Memory(
            host_held=objects + offloaded + (adapters_held if setting.cpu_offload else 0),
            host_peak=objects + max(staged + adapter_host_peak(inventory, setting) + self.host_peak, wrapped.host_peak),
            device_held=wrapped.held - offloaded + self.state + (0 if setting.cpu_offload else adapters_held),
            device_peak=max(self.device_peak, self.state + wrapped.device_peak)
            + (0 if setting.cpu_offload else adapters_held),
        )

    def _note(self, more: int, *, converted: int = 0) -> None:
        self.device_peak = max(self.device_peak, self.device + self.state + more)
        self.host_peak = max(self.host_peak, self.host + converted)

    def _slice(self, target: Target) -> Slice:
        return self.setting.loading.slice(target.form, self.rank)

    def _capacity(self, target: Target) -> int:
        return self.setting.loading.capacity(target.form, self.rank) * row_bytes(target)

    def _is_made_on_host(self, target: Target) -> bool:
        return not self.setting.keeps_data and not target.is_quantized and self.setting.loading.rank0_only

    def _filling(self, layer: Layer) -> int:
        """This rank's statistics, and a chunk that is being quantized."""
        statistics = sum(len(self._slice(target).blocks) for target in layer.targets) * STATISTIC_BYTES
        longest = max((len(self._slice(target).elements) for target in layer.targets if target.is_quantized), default=0)
        chunk = min(longest, self.staging.elements)
        on_cpu = self.setting.on_cpu
        each = CPU_QUANTIZE_BYTES if on_cpu else CUDA_QUANTIZE_BYTES + self.setting.dtype.itemsize
        return statistics + int(chunk * each)

    def _exchanging(self, quantized: Sequence[Target]) -> int:
        """Statistics: this rank's, everyone's as they arrive, everyone's by weight."""
        division = self.setting.loading
        mine = sum(len(self._slice(target).blocks) for target in quantized) * STATISTIC_BYTES
        if self.setting.world_size == 1:
            return mine + max((target.form.blocks for target in quantized), default=0) * STATISTIC_BYTES
        all_of_them = sum(target.form.blocks for target in quantized) * STATISTIC_BYTES
        longest = sum(len(division.slice(target.form, 0).blocks) for target in quantized) * STATISTIC_BYTES
        arriving = self.setting.world_size * longest
        return mine + arriving + max(mine + longest, all_of_them)

    def _converted(self, layer: Layer) -> int:
        """What the rank that converts has on its CPU: the sources of one parameter, and the result."""
        sizes = []
        for assignment, group in groupby(layer.targets, lambda target: target.assignment):
            targets = list(group)
            if targets[0].source is None:
                whole = sum(target.form.numel * target.read_as.itemsize for target in targets)
                sizes.append(whole * (1 if len(assignment.sources) == 1 else 2))
        return max(sizes, default=0)

    def _place(self, made: int, quantized: Sequence[Target]) -> None:
        if self.setting.keeps_data:
            self.device += made
            return
        longest = max((self._capacity(target) for target in quantized), default=0)
        run = min(longest, RUN_BYTES)
        self._note(made + run * (1 + self.setting.world_size if self.rank == 0 else 1))
        if self.rank == 0:
            self.host += sum(target.nbytes for target in quantized)
            self._note(0)


def _staging_bytes(staging: Staging, inventory: Inventory) -> int:
    """Of the buffers that are read into: all of them, as wide as the widest dtype."""
    widest = max((target.read_as.itemsize for target in inventory.targets), default=0)
    return staging.buffers * staging.elements * widest


def _object_bytes(inventory: Inventory) -> int:
    return sum(_objects(inventory))


def _objects(inventory: Inventory) -> Iterator[int]:
    yield len(inventory.targets) * MODULE_BYTES
    yield sum(len(unit.adapters) for unit in inventory.units) * ADAPTED_MODULE_BYTES // 2
