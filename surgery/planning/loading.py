"""Memory of one rank while it loads, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from surgery.comm.collectives import RUN_BYTES, THREADS
from surgery.passes.base import Batch
from surgery.passes.derive import run_elements
from surgery.passes.loading import Staging
from surgery.passes.setting import Setting
from surgery.passes.tensors import Target
from surgery.planning.inventory import (
    Inventory,
    adapters_as_made,
    adapters_being_drawn,
    adapters_held,
    fixed_bytes,
    row_bytes,
    state_bytes,
    weights_held,
)
from surgery.planning.ranks import Memory, Peaks
from surgery.quantizers.base import STATISTIC_BYTES

__all__ = ["plan_load"]

#: Temporary bytes for each element of which norms are taken: its value, what LoRA adds to it, and the sum.
DERIVING_BYTES = 12

#: Temporaries of a digest on a GPU: 16 MiB of packed bytes put together, and their products in 64 bits.
DIGEST_BYTES = 48 << 20


def plan_load(
    inventory: Inventory, setting: Setting, staging: Staging, batches: Sequence[Batch], *, rank: int
) -> Memory:
    """The figures of `rank`, which loads `batches` one after the other."""
    strategy = setting.strategy
    buffers = _staging_bytes(inventory, staging) + _landing_bytes(setting, rank)
    passing = buffers + adapters_being_drawn(inventory, setting, rank=rank)
    always = fixed_bytes(inventory, setting) + passing
    held = _Held(setting=setting, rank=rank, always=always, pinned=0 if setting.on_cpu else buffers)
    held.note(host_more=adapters_as_made(inventory, setting))
    if strategy.shards_on_meta:
        held.keep(adapters_held(inventory, setting), on_host=strategy.adapter_device(rank).type == "cpu")
    else:  # they wait to be sharded, or moved, as whole as the weights
        held.always += inventory.adapter_elements * setting.dtype.itemsize
    waiting = None
    for batch in batches:
        sizes = _sizes(batch, setting, rank)
        held.load(sizes, beside=0 if waiting is None else waiting.loaded)
        if waiting is not None:
            held.complete(waiting, beside=sizes.loaded)
        waiting = sizes
    held.always -= passing
    held.pinned = 0
    if waiting is not None:
        held.complete(waiting, beside=0)
    held.landing = 0
    return _finished(held, inventory)


def _staging_bytes(inventory: Inventory, staging: Staging) -> int:
    """Bytes of all buffers that are read into, in the widest dtype."""
    widest = max((target.read_as.itemsize for target in inventory.targets), default=0)
    # What is transposed is read by whole matrices, and has a copy then.
    unit = max((target.segments[0].unit for target in inventory.targets if target.segments), default=1)
    return staging.buffers * max(staging.elements, unit) * (1 if unit == 1 else 2) * widest


def _landing_bytes(setting: Setting, rank: int) -> int:
    """Bytes of the buffers through which rank 0's CPU gets what GPUs have quantized."""
    lands = setting.strategy.partition.rank0_only and rank == 0 and not setting.on_cpu
    return THREADS * RUN_BYTES["cuda"] if lands else 0


def _finished(held: _Held, inventory: Inventory) -> Memory:
    """The figures after the last batch, when the strategy has taken the model."""
    setting, peaks = held.setting, held.peaks
    strategy, kept = setting.strategy, held.host + held.device
    if not strategy.shards_on_meta:
        adapters = adapters_held(inventory, setting)
        units = inventory.whole_units(setting.dtype)
        moments = list(strategy.finishing_peaks(units, unsharded=inventory.unsharded, rank=held.rank))
        for host, device in moments:
            peaks.note(host=held.always + host, device=held.state + adapters + device)
        kept = adapters + (weights_held(inventory, setting) if moments else kept)
    offloaded = kept if strategy.cpu_offload else 0
    host_held = fixed_bytes(inventory, setting) + offloaded
    device_held = kept - offloaded + held.state
    peaks.note(host=host_held, device=device_held)
    return peaks.memory(host_held=host_held, device_held=device_held, on_cpu=setting.on_cpu)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes that one rank needs for a batch.

    on_host, made: of its parts, on rank 0's CPU and on the compute device. statistics: of this rank's blocks.
    filling: temporaries while parts are read and quantized. converting: on the CPU, of the rank that converts tensors.
    exchanging: statistics of all ranks, and what makes states of them. gathering: rows that ranks read for each other.
    deriving: values of weights that adapters are made of. state: quantization states. packed: quantized weights, whole.
    run: what is sent to rank 0 at a time.
    """

    on_host: int
    made: int
    statistics: int
    filling: int
    converting: int
    exchanging: int
    gathering: int
    deriving: int
    state: int
    packed: int
    run: int

    @property
    def loaded(self) -> int:
        """Bytes on the compute device until the batch is exchanged."""
        return self.made + self.statistics


def _sizes(batch: Batch, setting: Setting, rank: int) -> _Sizes:
    partition = setting.strategy.partition
    quantized = [target for target in batch.targets if target.is_quantized]
    capacities = {target: partition.capacity(target.form, rank) * row_bytes(target) for target in batch.targets}
    slices = [partition.slice(target.form, rank) for target in quantized]
    statistics = sum(len(each.blocks) for each in slices) * STATISTIC_BYTES
    runs = [_run_bytes(target, len(each.elements), setting) for target, each in zip(quantized, slices, strict=True)]
    on_host = sum(size for target, size in capacities.items() if target.is_read_by_rank0(partition))
    replicas = [(size, partition.grid_of(target.form).replicas) for target, size in capacities.items()]
    return _Sizes(
        on_host=on_host,
        made=sum(capacities.values()) - on_host,
        statistics=statistics,
        filling=statistics + max(runs, default=0),
        converting=_converting(batch.targets),
        exchanging=_exchanging(quantized, setting, mine=statistics),
        # NCCL needs nothing; gloo copies what goes out and comes in.
        gathering=max((size + size // n for size, n in replicas if n > 1), default=0) if setting.on_cpu else 0,
        deriving=_deriving(batch, setting, rank),
        state=state_bytes(quantized),
        packed=sum(target.nbytes for target in batch.targets if target.is_packed),
        run=min(
            max((capacities[target] for target in quantized), default=0), RUN_BYTES["cpu" if setting.on_cpu else "cuda"]
        ),
    )


def _run_bytes(target: Target, elements: int, setting: Setting) -> int:
    """Temporary bytes while `elements` of a target are quantized run by run."""
    assert target.quant is not None
    run = min(elements, target.quant.run_elements(setting.device))
    return int(run * target.quant.quantizing_bytes(setting.device))


def _exchanging(quantized: Sequence[Target], setting: Setting, *, mine: int) -> int:
    """Bytes of statistics: this rank's, all ranks' as received, all ranks' by weight; and of making states of them."""
    blocks = sum(target.form.blocks for target in quantized)
    everyones = blocks * STATISTIC_BYTES
    by_format = groupby(quantized, lambda target: target.quant)
    finishing: int = everyones + sum(
        quant.finishing_bytes([target.form.blocks for target in group]) for quant, group in by_format if quant
    )
    if setting.world_size == 1:
        return finishing
    partition = setting.strategy.partition
    longest = sum(len(partition.slice(target.form, 0).blocks) for target in quantized) * STATISTIC_BYTES
    return max(mine + setting.world_size * longest + max(mine + longest, everyones), finishing)


def _deriving(batch: Batch, setting: Setting, rank: int) -> int:
    """Temporary bytes of norms for DoRA, where PEFT does not compute them: some values and what LoRA adds to them."""
    if setting.lora is None or not setting.lora.use_dora or setting.strategy.holds_whole:
        return 0
    slices = [setting.strategy.partition.slice(target.form, rank) for target in batch.targets]
    most = max((len(each.elements) for each in slices), default=0)
    return min(most, run_elements(setting.device)) * DERIVING_BYTES


def _converting(targets: Iterable[Target]) -> int:
    """Bytes of the sources and results of the largest assignment that is converted whole, not read range by range."""
    most = 0
    for assignment, group in groupby(targets, lambda target: target.assignment):
        made = list(group)
        if not made[0].segments:
            size = sum(target.stored_bytes for target in made)
            most = max(most, size if assignment.converter is None else 2 * size)
    return most


@dataclass(kw_only=True)
class _Held:
    """Bytes held so far: parts on the host and on the device, states on the device.

    always: on the host, whatever else happens; pinned: of that. landing: of a batch that is on its way from rank 0's
    GPU to its CPU, while the next one is made.
    """

    setting: Setting
    rank: int
    always: int
    pinned: int
    host: int = 0
    device: int = 0
    state: int = 0
    landing: int = 0
    peaks: Peaks = field(default_factory=Peaks)

    def note(self, *, host_more: int = 0, device_more: int = 0) -> None:
        """Note a moment with so many bytes beside those held."""
        device = self.device + self.state + self.landing + device_more
        self.peaks.note(host=self.always + self.host + host_more, device=device, pinned=self.pinned)

    def keep(self, size: int, *, on_host: bool) -> None:
        """Hold `size` bytes more from now on."""
        if on_host:
            self.host += size
        else:
            self.device += size

    def load(self, sizes: _Sizes, *, beside: int) -> None:
        """Read and quantize a batch, while one of `beside` bytes waits to be exchanged."""
        self.host += sizes.on_host
        self.note(device_more=beside + sizes.made + sizes.filling, host_more=sizes.converting)

    def complete(self, sizes: _Sizes, *, beside: int) -> None:
        """Exchange and place a batch, beside `beside` bytes of the next one, which is loaded."""
        loaded = beside + sizes.made
        self.note(device_more=loaded + sizes.exchanging)
        self.note(device_more=loaded + sizes.gathering)
        self.note(device_more=loaded + sizes.state + sizes.deriving)
        self.state += sizes.state
        if sizes.packed and not self.setting.on_cpu:
            self.note(device_more=loaded + DIGEST_BYTES)
        if not self.setting.strategy.partition.rank0_only:
            self.keep(sizes.made, on_host=self.setting.strategy.devices(self.rank).data.type == "cpu")
            return
        self.landing = 0
        if self.rank != 0:
            self.note(device_more=loaded + sizes.run)
            return
        self.host += sizes.packed
        if not self.setting.on_cpu:
            self.landing = sizes.packed
        self.note(device_more=loaded + sizes.run * (1 + self.setting.world_size))
