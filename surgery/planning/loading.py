"""What one rank holds and peaks at while it loads: a walk through the layers, as the passes go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from surgery.comm.background import Staging
from surgery.comm.collectives import RUN_BYTES
from surgery.comm.device_to_host import THREADS
from surgery.passes.base import Batch
from surgery.passes.targets import Target
from surgery.planning.adapted import adapters_as_made, adapters_being_drawn, adapters_held, adapters_whole
from surgery.planning.allowances import CPU_QUANTIZE_BYTES, CUDA_QUANTIZE_BYTES, DIGEST_BYTES
from surgery.planning.figures import Memory
from surgery.planning.host import fixed_bytes
from surgery.planning.inventory import Inventory, row_bytes
from surgery.planning.peaks import Peaks
from surgery.planning.setting import Setting
from surgery.planning.statistics import STATISTIC_BYTES, quant_state_bytes
from surgery.planning.wrapping import held_when_sharded, wrap
from surgery.sharding.partition import Slice

__all__ = ["plan_load"]


def plan_load(
    inventory: Inventory, setting: Setting, staging: Staging, layers: Sequence[Batch], *, rank: int
) -> Memory:
    """The figures of `rank`. `layers` are those that the passes will visit."""
    buffers = _staging_bytes(inventory, staging) + _landing_bytes(setting, rank)
    passing = buffers + adapters_being_drawn(inventory, setting)
    always = fixed_bytes(inventory, setting) + passing
    walk = _Walk(setting=setting, staging=staging, rank=rank, always=always, pinned=0 if setting.on_cpu else buffers)
    walk.note(host_more=adapters_as_made(inventory, setting))
    if setting.placement != "sharded":  # adapters wait to be sharded, or moved, as whole as the weights
        walk.always += adapters_whole(inventory, setting)
    else:
        walk.hold(adapters_held(inventory, setting))
    for layer in layers:
        walk.visit(layer)
    walk.always -= passing
    walk.pinned = 0
    return walk.finish(inventory)


def _staging_bytes(inventory: Inventory, staging: Staging) -> int:
    """Of all buffers that are read into, in the widest dtype."""
    return (
        staging.buffers * staging.elements * max((target.read_as.itemsize for target in inventory.targets), default=0)
    )


def _quantized(layer: Batch) -> list[Target]:
    return [target for target in layer.targets if target.is_quantized]


def _landing_bytes(setting: Setting, rank: int) -> int:
    """Of the buffers through which rank 0's CPU gets what GPUs have quantized."""
    lands = setting.placement == "rank0-cpu" and setting.shard is not None and rank == 0 and not setting.on_cpu
    return THREADS * RUN_BYTES["cuda"] if lands else 0


@dataclass(kw_only=True)
class _Walk:
    """host, device: bytes of parts held so far, by where they wait. state: of quant_state, on the device. landing: of a
    layer that is on its way from rank 0's GPU to its CPU, while the next one is made. waiting: a layer that is loaded
    and not exchanged yet; beside: of the next one, meanwhile.
    """

    setting: Setting
    staging: Staging
    rank: int
    always: int  # on the host, whatever else happens
    pinned: int  # of that
    waiting: Batch | None = None
    beside: int = 0
    host: int = 0
    device: int = 0
    state: int = 0
    landing: int = 0
    peaks: Peaks = field(default_factory=Peaks)

    def note(self, *, host_more: int = 0, device_more: int = 0) -> None:
        """A moment with so much beside what is held."""
        held = self.device + self.state + self.landing + self.beside
        host = self.always + self.host + host_more
        self.peaks.note(host=host, device=held + device_more, pinned=self.pinned)

    def hold(self, size: int) -> None:
        """From now on, where shards wait."""
        if self.setting.cpu_offload:
            self.host += size
        else:
            self.device += size

    def visit(self, layer: Batch) -> None:
        """Load it; then exchange and place the one before."""
        on_host = [target for target in layer.targets if self._is_made_on_host(target)]
        self.host += sum(map(self._capacity, on_host))
        beside = 0 if self.waiting is None else self._loaded(self.waiting)
        working = self._made(layer) + self._filling(_quantized(layer))
        self.note(device_more=beside + working, host_more=self._converting(layer))
        self._complete(beside=self._loaded(layer))
        self.waiting = layer

    def _complete(self, *, beside: int) -> None:
        """Exchange and place the layer that waits, if one does, beside so many bytes on the device."""
        if self.waiting is None:
            return
        layer, self.waiting = self.waiting, None
        quantized, made = _quantized(layer), self._made(layer)
        self.beside = beside
        self.note(device_more=made + self._exchanging(quantized))
        self.note(device_more=made + self._gathering(layer))
        self.state += quant_state_bytes(quantized, self.setting.quant)
        if quantized and not self.setting.on_cpu:
            self.note(device_more=made + DIGEST_BYTES)
        self._place(made, quantized)
        self.beside = 0

    def _made(self, layer: Batch) -> int:
        """Bytes of its parts on the device."""
        return sum(self._capacity(target) for target in layer.targets if not self._is_made_on_host(target))

    def _loaded(self, layer: Batch) -> int:
        """The same with this rank's statistics."""
        blocks = sum(len(self._slice(target).blocks) for target in _quantized(layer))
        return self._made(layer) + blocks * STATISTIC_BYTES

    def finish(self, inventory: Inventory) -> Memory:
        """After the last layer: what FSDP makes of all of it."""
        self._complete(beside=0)
        setting, self.landing = self.setting, 0
        held = self.host + self.device
        if setting.placement != "sharded":
            adapters = adapters_held(inventory, setting)
            wrap(inventory, setting, self.peaks, rank=self.rank, host=self.always, device=self.state + adapters)
            held = adapters + (held_when_sharded(inventory, setting) if setting.shard is not None else self.device)
        offloaded = held if setting.cpu_offload else 0
        host_held = fixed_bytes(inventory, setting) + offloaded
        self.peaks.note(host=host_held, device=held - offloaded + self.state)
        memory = Memory(
            host_held=host_held,
            host_peak=self.peaks.host,
            anonymous_peak=self.peaks.anonymous,
            device_held=held - offloaded + self.state,
            device_peak=self.peaks.device,
        )
        return memory.on_cpu(peak=self.peaks.both) if setting.on_cpu else memory

    def _slice(self, target: Target) -> Slice:
        return self.setting.loading.slice(target.form, self.rank)

    def _capacity(self, target: Target) -> int:
        return self.setting.loading.capacity(target.form, self.rank) * row_bytes(target)

    def _is_made_on_host(self, target: Target) -> bool:
        return self.setting.loading.is_rank0s(target.form)

    def _filling(self, quantized: Sequence[Target]) -> int:
        """This rank's statistics, and a chunk that is being quantized."""
        statistics = sum(len(self._slice(target).blocks) for target in quantized) * STATISTIC_BYTES
        longest = max((len(self._slice(target).elements) for target in quantized), default=0)
        each = CPU_QUANTIZE_BYTES if self.setting.on_cpu else CUDA_QUANTIZE_BYTES
        return statistics + int(min(longest, self.staging.run_elements) * each)

    def _exchanging(self, quantized: Sequence[Target]) -> int:
        """Statistics: this rank's, everyone's as they arrive, everyone's by weight; what quantizes these."""
        everyones = sum(target.form.blocks for target in quantized) * STATISTIC_BYTES
        # Less their mean, twice, and as bytes, twice.
        nested = everyones * 5 // 2 if self.setting.quant.double_quant else 0
        if self.setting.world_size == 1:
            return everyones + nested
        mine = sum(len(self._slice(target).blocks) for target in quantized) * STATISTIC_BYTES
        longest = sum(len(self.setting.loading.slice(t.form, 0).blocks) for t in quantized) * STATISTIC_BYTES
        arriving = mine + self.setting.world_size * longest + max(mine + longest, everyones)
        return max(arriving, everyones + nested)

    def _gathering(self, layer: Batch) -> int:
        """Of the rows that ranks read for each other. NCCL needs nothing; gloo copies what goes out and comes in."""
        if not self.setting.on_cpu:
            return 0
        sizes = [(self._capacity(t), self.setting.loading.grid_of(t.form).replicas) for t in layer.targets]
        return max((size + size // replicas for size, replicas in sizes if replicas > 1), default=0)

    def _converting(self, layer: Batch) -> int:
        """What the rank that converts has on its CPU: the sources of one assignment, and what becomes of them."""
        found = [0]
        for assignment, group in groupby(layer.targets, lambda target: target.assignment):
            targets = list(group)
            if targets[0].source is None:
                size = sum(target.form.numel * target.read_as.itemsize for target in targets)
                found.append(size if assignment.converter is None else 2 * size)
        return max(found)

    def _place(self, made: int, quantized: Sequence[Target]) -> None:
        """Where shards wait on the device, that is all; else they go to the CPU of this rank, or to that of rank 0."""
        if self.setting.placement != "rank0-cpu" or self.setting.shard is None:
            self.hold(made)
            return
        self.landing = 0
        run = min(max(map(self._capacity, quantized), default=0), RUN_BYTES["cpu" if self.setting.on_cpu else "cuda"])
        if self.rank != 0:
            self.note(device_more=made + run)
            return
        whole = sum(target.nbytes for target in quantized)
        self.host += whole
        if not self.setting.on_cpu:
            self.landing = whole
        self.note(device_more=made + run * (1 + self.setting.world_size))
