"""Memory of one rank in a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.passes.setting import Setting, at_least_one
from surgery.planning.inventory import Inventory, UnitTensors, adapters_held, fixed_bytes, state_bytes, weights_held
from surgery.planning.ranks import Step

__all__ = ["Training", "plan_step"]

#: AdamW's, in the dtype of the parameter.
ADAMW_STATES = 2

FLOAT32_BYTES = 4

#: Copies of the logits in float32 at the worst moment of cross entropy: log-probabilities, and two gradients. With
#: this and the next, 8B under FSDP1 on two H200s (1 x 1024 tokens, no recomputation) peaked 4 % below the plan.
LOSS_COPIES = 3

#: Copies of the hidden state in float32 that the norms of a block keep for backward.
NORM_COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """The choices that decide the memory of a training step.

    batch, seq: samples that a rank puts through the model at once, and tokens of each.
    optimizer: AdamW keeps two states an element, in the dtype of the parameter; SGD (without momentum) none.
    checkpointing: whether activations of decoder blocks are recomputed in backward.
    """

    batch: int = 1
    seq: int = 1024
    optimizer: Literal["adamw", "sgd"] = "adamw"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        at_least_one(batch=self.batch, seq=self.seq)

    @property
    def tokens(self) -> int:
        """Tokens that a rank puts through the model at once."""
        return self.batch * self.seq


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """A moment of a step, by what is held beside what a rank holds between steps."""

    name: str
    gathered: int = 0
    dequantized: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return self.gathered + self.dequantized + self.activations + self.logits


def plan_step(inventory: Inventory, setting: Setting, training: Training, *, rank: int) -> Step:
    """The figures of `rank`, at the worse of two moments: the loss, and backward through the largest block."""
    weights, adapters = weights_held(inventory, setting), adapters_held(inventory, setting)
    state = state_bytes(inventory.targets)
    shards = setting.strategy.at_rest.shards
    own = sum(unit.adapter_elements(shards, position=rank % shards) for unit in inventory.units)
    optimizer = (ADAMW_STATES if training.optimizer == "adamw" else 0) * own * setting.dtype.itemsize
    on_host = weights + 2 * adapters + optimizer if setting.strategy.cpu_offload else 0
    moment = max(_moments(inventory, setting, training), key=lambda moment: moment.total)
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


def _moments(inventory: Inventory, setting: Setting, training: Training) -> tuple[_Moment, _Moment]:
    """The two moments, loss and backward. An estimate: attention is taken to keep no scores.

    Each linear layer keeps its input, for the adapter, and its output, for what comes after; norms keep copies in
    float32. A checkpointed block keeps its input alone.
    """
    norms = NORM_COPIES * inventory.hidden * FLOAT32_BYTES
    blocks = [unit.features * setting.compute_dtype.itemsize + norms for unit in inventory.blocks]
    inputs = len(blocks) * inventory.hidden * setting.dtype.itemsize
    kept = training.tokens * (inputs if training.checkpointing else sum(blocks))
    recomputed = training.tokens * max(blocks, default=0) if training.checkpointing else 0
    weights = [_kept_by_adapters(unit, setting) for unit in inventory.units]
    passing = training.tokens * max((unit.passing for unit in inventory.blocks), default=0)
    kept += 0 if training.checkpointing else sum(weights)
    recomputed += max(weights, default=0) if training.checkpointing else 0
    logit = LOSS_COPIES * FLOAT32_BYTES + setting.compute_dtype.itemsize
    units = inventory.whole_units(setting.dtype)
    loss = _Moment(
        name="loss",
        gathered=setting.strategy.gathered_at_loss(units),
        activations=kept,
        logits=training.tokens * inventory.vocabulary * logit,
    )
    backward = _Moment(
        name="backward",
        gathered=setting.strategy.gathered_in_backward(units) + _reduced(inventory, setting),
        dequantized=max(_dequantized(inventory), _of_adapters(inventory, setting)),
        activations=kept + recomputed + passing * setting.compute_dtype.itemsize,
    )
    return loss, backward


def _reduced(inventory: Inventory, setting: Setting) -> int:
    """Gradients of one block's adapters on their way to being reduced in float32; 0 where they are not sharded."""
    if setting.strategy.at_rest.shards == 1:
        return 0
    elements = max((unit.adapter_elements() for unit in inventory.blocks), default=0)
    return elements * (setting.dtype.itemsize + FLOAT32_BYTES)


def _kept_by_adapters(unit: UnitTensors, setting: Setting) -> int:
    """Bytes of weights that adapters make and keep for backward: those of experts, and DoRA where there is dropout."""
    dropping = setting.lora is not None and setting.lora.lora_dropout
    elements = sum(rows * columns for rows, columns in unit.dora) if dropping else 0
    return (elements + sum(unit.folded)) * setting.compute_dtype.itemsize


def _of_adapters(inventory: Inventory, setting: Setting) -> int:
    """Temporary bytes of the largest layer whose adapters make whole weights.

    DoRA: an identity, the weight, what LoRA adds, that scaled, the sum. Experts: the gradient of what they have made.
    """
    sizes = [columns * (columns + 4 * rows) for unit in inventory.units for columns, rows in unit.dora]
    sizes += [size for unit in inventory.units for size in unit.folded]
    return max(sizes, default=0) * setting.compute_dtype.itemsize


def _dequantized(inventory: Inventory) -> int:
    """Temporary bytes of the quantized layer with most."""
    kinds = {(each.quant, each.logical) for each in inventory.targets if each.quant is not None}
    sizes = (quant.dequantized_bytes(shape) for quant, shape in kinds if shape is not None)
    return max(sizes, default=0)
