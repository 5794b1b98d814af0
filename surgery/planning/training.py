"""Memory of one rank in a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.errors import ConfigError
from surgery.passes.setting import Setting, at_least_one
from surgery.planning.inventory import Inventory, UnitTensors, adapters_held, fixed_bytes, state_bytes, weights_held
from surgery.planning.ranks import Step
from surgery.step.kernels import KERNELS

__all__ = ["Training", "plan_step"]

#: AdamW's, in the dtype of the parameter.
ADAMW_STATES = 2

FLOAT32_BYTES = 4

#: Copies of the logits in float32 at the worst moment of cross entropy: log-probabilities, and two gradients.
LOSS_COPIES = 3

#: Norms of a block: each keeps a copy of the hidden state in float32 for backward, Liger's what it was given.
NORMS = 2

#: Hidden states beside a chunk of logits in Liger's loss: before the last norm, after it, and its gradient.
LIGER_COPIES = 3

#: Those beside a tile of logits in TRL's loss: after the last norm, those of them that count, and their gradient, which
#: is there in float32 too.
TRL_COPIES = 3

#: Tokens, and words of the vocabulary, of such a tile (`TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE` of trl 1.16).
TRL_TILE = (4096, 32768)

#: Bytes beside each value of it in backward on a CPU, where no kernel works in place: seven in float32, and a mask.
TRL_BYTES_ON_CPU = 7 * FLOAT32_BYTES + 1

#: Inputs of offloaded blocks that are on the device at once: of the block in backward, and of the one that comes next.
ON_DEVICE = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """The choices that decide the memory of a training step.

    batch, seq: samples that a rank puts through the model at once, and tokens of each.
    optimizer: AdamW keeps two states an element, in the dtype of the parameter; SGD (without momentum) none.
    checkpointing: whether activations of decoder blocks are recomputed in backward.
    offload: whether the inputs of recomputed blocks wait for backward in pinned memory of the host.
    kernels: of "fused" (4-bit layers with LoRA) and "liger" (norms, rotary embedding, MLP, loss).
    loss: the model's own, of logits or Liger's; or that of TRL's trainers, which make no logits but a tile at a time.
    graphs: shapes of batches, none larger than this one, that `surgery.capture` records; 0 for none. Beside several
        of them one step runs as without: of a shape that is not recorded yet, or not any more.

    Raises `ConfigError` for other kernels, for `offload` without `checkpointing`, and for less than 0 `graphs`.
    """

    batch: int = 1
    seq: int = 1024
    optimizer: Literal["adamw", "sgd"] = "adamw"
    checkpointing: bool = False
    offload: bool = False
    kernels: tuple[str, ...] = ()
    loss: Literal["model", "trl"] = "model"
    graphs: int = 0

    def __post_init__(self) -> None:
        at_least_one(batch=self.batch, seq=self.seq)
        unknown = [name for name in self.kernels if name not in KERNELS]
        if unknown:
            raise ConfigError(f"kernels: expected names among {', '.join(KERNELS)}, found {unknown[0]!r:.80}")
        if self.offload and not self.checkpointing:
            raise ConfigError("expected recomputed activations (checkpointing) with offload, which moves their inputs")
        if self.graphs < 0:
            raise ConfigError(f"expected graphs to be 0 or more, found {self.graphs}")

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
    shapes = _shapes(setting, training)
    # A recording keeps its host memory, and what runs beside several of them takes its own.
    offloaded = _Kept.of(inventory, setting, training).on_host * (shapes + 1 if shapes > 1 else 1)
    moment = max(_moments(inventory, setting, training), key=lambda moment: moment.total)
    recorded = _recorded(inventory, setting, training)
    total = weights + state + 2 * adapters + optimizer + moment.total + recorded
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
        recorded=recorded,
        offloaded=offloaded,
        on_host=on_host,
        host_peak=fixed_bytes(inventory, setting) + (total if setting.on_cpu else on_host + offloaded),
        device_peak=0 if setting.on_cpu else total - on_host,
        moment=moment.name,
    )


def _moments(inventory: Inventory, setting: Setting, training: Training) -> tuple[_Moment, _Moment]:
    """The two moments, loss and backward. An estimate: attention is taken to keep no scores."""
    kept = _Kept.of(inventory, setting, training)
    fused = _dequantized(inventory) if "fused" in training.kernels else 0
    units = inventory.whole_units(setting.dtype)
    loss = _Moment(
        name="loss",
        gathered=setting.strategy.gathered_at_loss(units),
        dequantized=fused,  # whose memory is used again, and not freed between
        activations=kept.at_loss,
        logits=_logits(inventory, setting, training),
    )
    backward = _Moment(
        name="backward",
        gathered=setting.strategy.gathered_in_backward(units) + _reduced(inventory, setting),
        dequantized=max(_dequantized(inventory), _of_adapters(inventory, setting)),
        activations=kept.in_backward,
    )
    return loss, backward


def _shapes(setting: Setting, training: Training) -> int:
    """Shapes that are recorded as CUDA graphs; 0 where steps run as without."""
    strategy = setting.strategy
    return 0 if setting.on_cpu or strategy.cpu_offload or not strategy.records_steps else training.graphs


def _recorded(inventory: Inventory, setting: Setting, training: Training) -> int:
    """Bytes that recorded steps take beside a step that runs as without.

    Graphs share a pool, which nothing else is given memory of. It is as large as the largest step in it, and keeps, for
    each shape, what the graphs write: outputs, and gradients. A pool of one shape takes the place of that step; steps
    of further shapes run beside it until they are recorded.
    """
    shapes = _shapes(setting, training)
    if not shapes:
        return 0
    loss, backward = _moments(inventory, setting, training)
    outputs = training.tokens * inventory.vocabulary * setting.compute_dtype.itemsize * (training.loss == "model")
    pool = (
        max(loss.total, backward.total + outputs)
        + (shapes - 1) * outputs
        + _recorded_gradients(setting, shapes) * adapters_held(inventory, setting)
    )
    if shapes > 1:
        return pool
    # What a replay copies its outputs to, and memory of dequantized weights, of which each stream has some.
    beside = outputs + ("fused" in training.kernels) * _dequantized(inventory)
    return pool + beside - max(loss.total, backward.total)


def _recorded_gradients(setting: Setting, shapes: int) -> int:
    """Copies of all gradients beside `.grad`.

    What the graphs write, and what autograd adds to `.grad`; where they are sharded, each recording brings the tensor
    that `.grad` may become, and adds to it.
    """
    return shapes + 1 if setting.strategy.at_rest.shards == 1 else 2 * shapes - 1


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Bytes of activations on the device at both moments, and of those that wait on the host."""

    at_loss: int
    in_backward: int
    on_host: int

    @classmethod
    def of(cls, inventory: Inventory, setting: Setting, training: Training) -> _Kept:
        """Count what blocks keep for each token, by either way of keeping it.

        Linear layers keep their inputs, for the adapters, and what they give, for what comes after; norms keep copies.
        A checkpointed block keeps its input alone.
        """
        liger, itemsize = "liger" in training.kernels, setting.compute_dtype.itemsize
        norm = inventory.hidden * (itemsize if liger else FLOAT32_BYTES)
        dropping = itemsize + 1 if setting.lora is not None and setting.lora.lora_dropout else 0  # and what it has left
        # The product of a gated MLP, which fused layers compute again where no checkpoint packs what they keep.
        again = "fused" in training.kernels and not training.checkpointing and not dropping
        blocks = [
            training.tokens
            * ((unit.features - (liger + again) * unit.activated) * itemsize + NORMS * norm + unit.inputs * dropping)
            + _kept_by_adapters(unit, setting)
            for unit in inventory.blocks
        ]
        # The fused MLP writes gradients over what it has kept.
        passing = [inventory.hidden + unit.passing - liger * unit.activated for unit in inventory.blocks]
        on_its_way = training.tokens * max(passing, default=0) * itemsize
        one = training.tokens * inventory.hidden * setting.dtype.itemsize
        last = _behind_blocks(inventory, setting, training)
        if not training.checkpointing:
            return cls(at_loss=sum(blocks) + last, in_backward=sum(blocks) + on_its_way, on_host=0)
        block = max(blocks, default=0) + on_its_way
        if setting.on_cpu or not training.offload:
            return cls(at_loss=len(blocks) * one + last, in_backward=len(blocks) * one + block, on_host=0)
        return cls(
            at_loss=one + last,
            in_backward=min(len(blocks), ON_DEVICE) * one + block,
            on_host=(len(blocks) - 1) * _pinned(one),
        )


def _pinned(size: int) -> int:
    """Bytes that torch pins for `size`: the next power of two."""
    return 1 << (size - 1).bit_length()


def _behind_blocks(inventory: Inventory, setting: Setting, training: Training) -> int:
    """Bytes of the hidden states of all tokens at the loss, without those that blocks keep."""
    itemsize = setting.compute_dtype.itemsize
    norm = itemsize if "liger" in training.kernels else FLOAT32_BYTES
    if training.loss == "trl":
        each = norm + TRL_COPIES * itemsize + FLOAT32_BYTES
    else:
        each = LIGER_COPIES * itemsize if _chunks(inventory, setting, training) else norm
    return training.tokens * inventory.hidden * each


def _chunks(inventory: Inventory, setting: Setting, training: Training) -> bool:
    """Whether the model's own loss is Liger's, of logits in chunks. It is the stock one in steps that are recorded."""
    return "liger" in training.kernels and not inventory.stock_loss and not _shapes(setting, training)


def _logits(inventory: Inventory, setting: Setting, training: Training) -> int:
    """Bytes of logits and their gradients. Liger's loss makes a chunk at a time, which takes about what its input does.

    The size of a chunk is that of `fused_linear_cross_entropy_forward` in liger-kernel 0.8.5.
    """
    tokens, vocabulary, itemsize = training.tokens, inventory.vocabulary, setting.compute_dtype.itemsize
    if training.loss == "trl":
        rows, columns = TRL_TILE
        beside = min(vocabulary, columns) * TRL_BYTES_ON_CPU if setting.on_cpu else 0
        return min(tokens, rows) * (columns * itemsize + beside)  # of a small vocabulary too
    if not _chunks(inventory, setting, training) or not vocabulary:
        return tokens * vocabulary * (LOSS_COPIES * FLOAT32_BYTES + itemsize)
    chunks = -(-vocabulary // inventory.hidden)
    return min(1 << (-(-tokens // chunks) - 1).bit_length(), tokens) * vocabulary * itemsize


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
