"""What one rank holds and peaks at in a training step."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.config import FSDP1, FSDP2
from surgery.planning.activations import Activations, estimate
from surgery.planning.adapted import adapters_held
from surgery.planning.allowances import GATHERED_BLOCKS
from surgery.planning.figures import Step
from surgery.planning.host import fixed_bytes
from surgery.planning.inventory import EMBEDDING, ROOT, TAIL, Inventory, Unit
from surgery.planning.setting import Setting, Training
from surgery.planning.statistics import STATISTIC_BYTES, quant_state_bytes
from surgery.planning.wrapping import held_when_sharded

__all__ = ["plan_step"]

#: AdamW's, in the dtype of the parameter.
ADAMW_STATES = 2

#: Gradients are reduced in float32.
REDUCE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """A moment of a step, by what is held beside what a rank holds between steps."""

    name: str
    gathered: int
    dequantized: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.gathered + self.dequantized + self.activations + self.logits


def plan_step(inventory: Inventory, setting: Setting, training: Training, *, rank: int) -> Step:
    """The figures of `rank`, at the worse of two moments: the loss, and backward through the largest block."""
    adapters = adapters_held(inventory, setting)
    weights = held_when_sharded(inventory, setting)
    state = quant_state_bytes(inventory.targets, setting.quant)
    states = ADAMW_STATES if training.optimizer == "adamw" else 0
    position = rank % setting.sharding.shards
    own = sum(unit.adapter_elements(setting.sharding.shards, position=position) for unit in inventory.units)
    optimizer = states * own * setting.dtype.itemsize
    on_host = weights + 2 * adapters + optimizer if setting.cpu_offload else 0
    moment = max(_moments(inventory, setting, estimate(inventory, setting, training)), key=lambda m: m.total)
    total = weights + state + 2 * adapters + optimizer + moment.total
    return Step(
        weights=weights,
        quant_state=state,
        adapters=adapters,
        gradients=adapters,
        optimizer=optimizer,
        gathered=moment.gathered,
        dequantized=moment.dequantized,
        activations=moment.activations,
        logits=moment.logits,
        on_host=on_host,
        host_peak=fixed_bytes(inventory, setting) + (total if setting.on_cpu else on_host),
        device_peak=0 if setting.on_cpu else total - on_host,
        moment=moment.name,
    )


def _moments(inventory: Inventory, setting: Setting, activations: Activations) -> tuple[_Moment, ...]:
    return (
        _Moment(
            name="loss",
            gathered=_gathered_at_loss(inventory, setting),
            dequantized=0,
            activations=activations.kept,
            logits=activations.logits,
        ),
        _Moment(
            name="backward",
            gathered=_gathered_in_backward(inventory, setting),
            dequantized=_dequantized(inventory, setting),
            activations=activations.kept + activations.recomputed,
            logits=0,
        ),
    )


def _gathered_at_loss(inventory: Inventory, setting: Setting) -> int:
    """FSDP2: the last norm and the head, as they were gathered and as parameters, since nothing follows that would free
    the buffer; and what the root has. FSDP1: the root unit, which has all of these, and the last blocks.
    """
    if not _gathers(setting):
        return 0
    units = {unit.name: _whole(unit, setting) for unit in inventory.units}
    if setting.gathers_all:
        return sum(units.values())
    if isinstance(setting.shard, FSDP1):
        return _ends(units)
    return 2 * units.get(TAIL, 0) + units.get(ROOT, 0)


def _gathered_in_backward(inventory: Inventory, setting: Setting) -> int:
    """The largest blocks, and the gradients of one block's adapters on their way to being reduced."""
    if not _gathers(setting):
        return 0
    units = {unit.name: _whole(unit, setting) for unit in inventory.units}
    reduced = max((unit.adapter_elements() for unit in inventory.blocks), default=0)
    gradients = reduced * (setting.dtype.itemsize + REDUCE_BYTES)
    if setting.gathers_all:
        return sum(units.values()) + gradients
    largest = sorted((units[unit.name] for unit in inventory.blocks), reverse=True)
    if isinstance(setting.shard, FSDP2):
        return sum(largest[:1]) * GATHERED_BLOCKS + units.get(ROOT, 0) + gradients
    return sum(largest[:2]) + _ends(units) + gradients


def _ends(units: dict[str, int]) -> int:
    return sum(units.get(name, 0) for name in (EMBEDDING, TAIL, ROOT))


def _gathers(setting: Setting) -> bool:
    return setting.shard is not None and setting.sharding.shards > 1


def _whole(unit: Unit, setting: Setting) -> int:
    return unit.weight_bytes() + unit.adapter_elements() * setting.dtype.itemsize


def _dequantized(inventory: Inventory, setting: Setting) -> int:
    """Of the largest layer: the weight in 16 bits, and its statistics in float32 if they are quantized too."""
    largest = max(
        (target.form for target in inventory.targets if target.is_quantized), key=lambda f: f.numel, default=None
    )
    if largest is None:
        return 0
    statistics = largest.blocks * STATISTIC_BYTES if setting.quant.double_quant else 0
    return largest.numel * setting.compute_dtype.itemsize + statistics
