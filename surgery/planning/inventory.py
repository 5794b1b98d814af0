"""The sizes that a model's memory depends on: of tensors by unit, of features by decoder block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from surgery.adapters.attach import draws_later
from surgery.model.fqn import split
from surgery.model.tree import Site, decoder_blocks, ends_of
from surgery.passes.prepare import Prepared
from surgery.passes.setting import Setting
from surgery.passes.tensors import Target
from surgery.quantizers.base import QuantFormat
from surgery.sharding.base import Unit
from surgery.sharding.partition import Form
from surgery.step.liger import stock_loss

__all__ = [
    "Inventory",
    "UnitTensors",
    "adapters_as_made",
    "adapters_being_drawn",
    "adapters_held",
    "fixed_bytes",
    "row_bytes",
    "state_bytes",
    "take_inventory",
    "weights_held",
]

BLOCK, EMBEDDING, TAIL, ROOT = "block", "embedding", "tail", "root"

#: Copies of a layer's output that DoRA keeps for backward: the base's, and that of its adapter, which it scales apart.
DORA_COPIES = 2

#: Copies of what experts give that there are at once in backward: the gradient of each, sorted, and times its weight.
PASSING = 3

#: Names of the number of experts that a token visits, in configurations of transformers.
ACTIVE = ("num_experts_per_tok", "moe_topk")


@dataclass(frozen=True, kw_only=True)
class UnitTensors:
    """The tensors of a unit, by their rows, along which they are divided.

    kind: as of a `Unit`. weights: rows, and bytes of a row, of each frozen tensor. adapters: rows, and elements of a
    row. features: elements a token that a block keeps for backward beside its norms, and what DoRA keeps; 0 for other
    kinds. activated: those of them that its activation functions give. inputs: elements a token that its linear layers
    with adapters take, each by itself. passing: elements a token that are on their way through a layer, or experts, in
    backward. dora: `(in, out)` of each layer with DoRA. folded: elements of each tensor that adapters of experts make
    in forward, and keep for backward.
    """

    kind: str
    weights: tuple[tuple[int, int], ...]
    adapters: tuple[tuple[int, int], ...]
    features: int = 0
    activated: int = 0
    inputs: int = 0
    passing: int = 0
    dora: tuple[tuple[int, int], ...] = ()
    folded: tuple[int, ...] = ()

    def weight_bytes(self, shards: int = 1) -> int:
        """Bytes of the weights, or of one of `shards` parts, padded to the largest one."""
        return sum(-(-rows // shards) * row for rows, row in self.weights)

    def adapter_elements(self, shards: int = 1, *, position: int | None = None) -> int:
        """Elements of the adapters, or of one of `shards` parts: padded to the largest one, or that at `position`."""
        return sum(_rows(rows, shards, position) * row for rows, row in self.adapters)


def _rows(rows: int, shards: int, position: int | None) -> int:
    largest = -(-rows // shards)
    return largest if position is None else max(min(largest, rows - position * largest), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inventory:
    """The tensors of a model, and the sizes that activations depend on.

    targets: what a checkpoint fills, in the order in which it is loaded. units: decoder blocks first, in order.
    unsharded: bytes of parameters that are in no unit, whole on every rank.
    hidden: elements a token between blocks. vocabulary: outputs of the head, 0 without one.
    ignored, initialized, left_out: names as `Prepared` has them.
    stock_loss: whether the model computes its own loss with Liger's kernels too.
    in_16_bits: of the same model with its experts in 16 bits; None if none are packed.
    """

    targets: tuple[Target, ...]
    units: tuple[UnitTensors, ...]
    unsharded: int
    hidden: int
    vocabulary: int
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    stock_loss: bool = False
    in_16_bits: Inventory | None = None

    @property
    def parameters(self) -> int:
        """Number of elements that the checkpoint fills."""
        return sum(target.form.numel for target in self.targets if target.statistics_of is None)

    @property
    def experts(self) -> tuple[Target, ...]:
        """The packed weights of fused experts."""
        return tuple(target for target in self.targets if _is_fused(target))

    @cached_property
    def forms(self) -> dict[Form, int]:
        """Number of tensors of each form."""
        found: dict[Form, int] = {}
        for target in self.targets:
            found[target.form] = found.get(target.form, 0) + 1
        return found

    @property
    def blocks(self) -> tuple[UnitTensors, ...]:
        """The decoder blocks."""
        return tuple(unit for unit in self.units if unit.kind == BLOCK)

    @property
    def adapter_elements(self) -> int:
        """Elements of all adapters, whole."""
        return sum(unit.adapter_elements() for unit in self.units)

    def whole_units(self, dtype: torch.dtype) -> tuple[Unit, ...]:
        """All units in bytes, in the order in which they are sharded, with adapters in `dtype`."""
        return tuple(
            Unit(kind=each.kind, weights=each.weight_bytes(), adapters=each.adapter_elements() * dtype.itemsize)
            for each in self.units
        )


def row_bytes(target: Target) -> int:
    """Bytes of one stored row of `target`."""
    return target.shape[1:].numel() * target.dtype.itemsize


def _is_fused(target: Target) -> bool:
    return target.logical is not None and len(target.logical) == 3


def take_inventory(prepared: Prepared) -> Inventory:
    """The inventory of a prepared model.

    What is trained in place is counted with the adapters, as what has a gradient, and not with the frozen weights.
    """
    found = _taken(prepared)
    return replace(found, in_16_bits=_taken(_unpacked(prepared))) if found.experts else found


def _unpacked(prepared: Prepared) -> Prepared:
    """`prepared` with its experts in 16 bits."""
    dtype = prepared.setting.dtype
    targets = [_stack(each, dtype) if _is_fused(each) else each for each in prepared.targets]
    return replace(prepared, targets=tuple(each for each in targets if each.statistics_of is None))


def _stack(target: Target, dtype: torch.dtype) -> Target:
    """A packed weight of fused experts as it was before, `(experts, d1, d2)`."""
    shape = target.logical
    assert shape is not None
    form = Form(rows=shape[0], row=shape[1:].numel(), numel=shape.numel())
    return replace(target, shape=shape, dtype=dtype, form=form, logical=None, layout=None, stored=None, quant=None)


def _taken(prepared: Prepared) -> Inventory:
    model, blocks = prepared.model, decoder_blocks(prepared.model)
    unit_of = _unit_of(model, blocks)
    weights: dict[str, list[tuple[int, int]]] = {}
    adapters: dict[str, list[tuple[int, int]]] = {}
    elsewhere = prepared.unsharded | {each.fqn for each in prepared.trained if each.is_base}
    for target in prepared.targets:
        if not target.form.is_buffer and target.fqn not in elsewhere:
            name = unit_of.get(target.places[0][0], ROOT)
            weights.setdefault(name, []).append((target.form.rows, row_bytes(target)))
    unit_at = {name: unit_of[module] for name, module in model.named_modules() if module in unit_of}
    dora: dict[str, list[tuple[int, int]]] = {}
    folded: dict[str, list[int]] = {}
    stacks = {each.module_fqn: each for each in prepared.targets if len(each.logical or each.shape) == 3}
    inputs: dict[str, int] = {}
    shapes = {each.fqn: each.shape for each in prepared.trained}
    for each in prepared.trained:
        unit = _unit_at(each.fqn, unit_at)
        adapters.setdefault(unit, []).append((each.shape[0], each.shape[1:].numel()))
        layer, _, name = each.fqn.partition(".lora_magnitude_vector.")
        if name:
            first = shapes.get(f"{layer}.lora_A.{name}") or shapes[f"{layer}.lora_embedding_A.{split(name)[0]}"]
            dora.setdefault(unit, []).append((first[1:].numel(), each.shape.numel()))
        layer, _, name = each.fqn.partition(".lora_A.")
        if name and layer.replace(".base_layer", "") not in stacks:
            inputs[unit] = inputs.get(unit, 0) + each.shape[1:].numel()
        layer, _, name = each.fqn.partition(".lora_B.")
        stack = stacks.get(layer.replace(".base_layer", ""))
        if name and stack is not None:
            folded.setdefault(unit, []).append(_folded(shapes[f"{layer}.lora_A.{name}"], each.shape, stack))
    formats = prepared.setting.formats
    hidden = _hidden(model, blocks)
    sizes = {block.fqn: _sizes(block.module, formats, hidden) for block in blocks}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return Inventory(
        targets=prepared.targets,
        units=tuple(
            UnitTensors(
                kind=BLOCK if name in sizes else name,
                weights=tuple(weights.get(name, ())),
                adapters=tuple(adapters.get(name, ())),
                features=of_block.features + DORA_COPIES * sum(size for _, size in dora.get(name, ())),
                activated=of_block.activated,
                inputs=inputs.get(name, 0),
                passing=of_block.passing,
                dora=tuple(dora.get(name, ())),
                folded=tuple(folded.get(name, ())),
            )
            for name in (*sizes, EMBEDDING, TAIL, ROOT)
            if name in weights or name in adapters
            for of_block in [sizes.get(name, _Sizes())]
        ),
        unsharded=sum(target.nbytes for target in prepared.targets if target.fqn in prepared.unsharded),
        hidden=hidden,
        vocabulary=head.out_features if isinstance(head, nn.Linear) else 0,
        ignored=prepared.ignored,
        initialized=prepared.initialized,
        left_out=prepared.left_out,
        stock_loss=stock_loss(model, [each.fqn for each in prepared.trained]) is not None,
    )


def _unit_of(model: nn.Module, blocks: Sequence[Site]) -> dict[nn.Module, str]:
    """The unit of every module that is in one: a block by its FQN, the others by their kind."""
    embedding, tail = ends_of(model, blocks)
    found = {module: site.fqn for site in blocks for module in site.module.modules()}
    found |= {module: TAIL for end in tail for module in end.modules()}
    if embedding is not None:
        found |= dict.fromkeys(embedding.modules(), EMBEDDING)
    return found


def _unit_at(fqn: str, units: dict[str, str]) -> str:
    """The unit of the innermost module that `fqn` is in and that `units` knows, by its FQN."""
    while fqn:
        fqn = split(fqn)[0]
        if fqn in units:
            return units[fqn]
    return ROOT


def _folded(first: torch.Size, second: torch.Size, stack: Target) -> int:
    """Elements that an adapter of experts makes: a copy of its second factor; of experts in 16 bits PEFT's whole stack.

    first: `(rank * experts, in)`; second: `(out, rank * experts)`.
    """
    return second.numel() if stack.logical is not None else first[1:].numel() * second[0] * stack.shape[0]


class _Sizes(NamedTuple):
    """Elements a token, as a `UnitTensors` has them."""

    features: int = 0
    activated: int = 0
    passing: int = 0


def _sizes(block: nn.Module, formats: Sequence[QuantFormat], hidden: int) -> _Sizes:
    found = [
        size
        for module in block.modules()
        for size in (_of_linears(module, formats, hidden), _of_experts(module, formats))
    ]
    return _Sizes(
        features=sum(each.features for each in found),
        activated=sum(each.activated for each in found),
        passing=max((each.passing for each in found), default=0),
    )


def _of_linears(parent: nn.Module, formats: Sequence[QuantFormat], hidden: int) -> _Sizes:
    """Elements that the linear layers directly in `parent`, an attention or an MLP, keep.

    Layers that take as many features take the same. What the last one that gives `hidden` gives is added to the
    residual, and not kept. An activation function keeps what it is given, which a layer gives, and what it gives,
    beside what the last layer takes where that is the product with a gate.
    """
    shapes = [shape for child in parent.children() if (shape := _shape_of(child, formats)) is not None]
    if not shapes:
        return _Sizes()
    last = max((n for n, shape in enumerate(shapes) if shape[0] == hidden), default=len(shapes) - 1)
    (_, taken), others = shapes[last], shapes[:last] + shapes[last + 1 :]
    given = sum(out for out, _ in others)
    if not others:
        return _Sizes(features=sum(shapes[0]), passing=taken)
    activates = any(name.startswith("act") for name, _ in parent.named_children())
    is_gated = activates and given == 2 * taken
    return _Sizes(
        features=sum({in_features for _, in_features in others}) + given + taken * (2 if is_gated else 1),
        activated=taken if is_gated else 0,
        # The gradient of a product and of its two factors, where the product itself is kept no more.
        passing=taken * (2 if is_gated else 1),
    )


def _shape_of(module: nn.Module, formats: Sequence[QuantFormat]) -> tuple[int, int] | None:
    """`(out, in)` of a linear layer, packed or not; None for all others."""
    quant = next((each for each in formats if each.is_quantized(module)), None)
    if quant is None:
        return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
    logical = [quant.logical(module, name) for name in quant.weight_names(module)]
    found = next((shape for shape in logical if len(shape) == 2), None)
    return None if found is None else (found[0], found[1])


def _of_experts(module: nn.Module, formats: Sequence[QuantFormat]) -> _Sizes:
    """Elements that active fused experts take and give, and that their activation function gives."""
    quant = next((each for each in formats if each.is_quantized(module)), None)
    packed = {} if quant is None else {name: quant.logical(module, name) for name in quant.weight_names(module)}
    shapes = {name: packed.get(name, p.shape) for name, p in module._parameters.items() if p is not None}
    stacks = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    given = sum(shape[1] + shape[2] for shape in stacks.values())
    if "down_proj" not in stacks:
        return _Sizes(features=_active(module) * given)
    hidden, inner = stacks["down_proj"][1:][:: -1 if getattr(module, "is_transposed", False) else 1]
    return _Sizes(features=_active(module) * (given + inner), passing=_active(module) * PASSING * hidden)


def _active(module: Any) -> int:
    """Experts that a token visits."""
    found = (getattr(getattr(module, "config", None), name, None) for name in ACTIVE)
    return next((number for number in found if isinstance(number, int)), 1)


def _hidden(model: nn.Module, blocks: Sequence[Site]) -> int:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[1]
    inputs = (m.in_features for site in blocks for m in site.module.modules() if isinstance(m, nn.Linear))
    return next(inputs, 0)


MIB = 1 << 20

#: Host memory that loading takes whatever the model: threads and their stacks, code and tables made on first use.
#: What a checkpoint of 251 MB took beside its tensors, upstream's modules imported before, with a C library that gives
#: freed memory back at once (`MALLOC_MMAP_THRESHOLD_=262144`): glibc as it comes keeps up to 20 MiB more.
HOST_BYTES = 5 * MIB

#: The same of a process group and of FSDP, where there are several ranks: on 2, 3 and 4 ranks of gloo.
GROUP_BYTES = 4 * MIB

#: Python objects for each tensor of the checkpoint (module, target, buffer), and for each of an adapter (PEFT's,
#: FSDP's): of models on meta with 2 and with 126 layers.
TARGET_OBJECT_BYTES = 7 << 10
ADAPTER_OBJECT_BYTES = 57 << 10

#: Bytes of an element of adapters as PEFT makes them: float32, on the CPU of every rank. It casts them then.
MADE_IN_BYTES = 4


def fixed_bytes(inventory: Inventory, setting: Setting) -> int:
    """Host memory of threads, tables and Python's objects, while a model is loaded and after."""
    adapters = sum(len(unit.adapters) for unit in inventory.units)
    objects = len(inventory.targets) * TARGET_OBJECT_BYTES + adapters * ADAPTER_OBJECT_BYTES
    return HOST_BYTES + (GROUP_BYTES if setting.world_size > 1 else 0) + objects


def state_bytes(targets: Iterable[Target]) -> int:
    """Bytes of the quantization states of `targets`, whole, as every rank has them."""
    return sum(each.quant.state_bytes(each.form.blocks) for each in targets if each.is_quantized and each.quant)


def weights_held(inventory: Inventory, setting: Setting) -> int:
    """Bytes of frozen weights that a rank keeps of the complete model, padded to what the rank with most has."""
    shards = setting.strategy.at_rest.shards
    return inventory.unsharded + sum(unit.weight_bytes(shards) for unit in inventory.units)


def adapters_held(inventory: Inventory, setting: Setting) -> int:
    """Bytes of adapters that a rank keeps, padded to what the rank with most has."""
    shards = setting.strategy.at_rest.shards
    return sum(unit.adapter_elements(shards) for unit in inventory.units) * setting.dtype.itemsize


def adapters_as_made(inventory: Inventory, setting: Setting) -> int:
    """Bytes of all adapters before they are cast, where PEFT makes all of them before any is sharded; else 0."""
    if setting.lora is None or draws_later(setting.lora):
        return 0
    return inventory.adapter_elements * MADE_IN_BYTES


def adapters_being_drawn(inventory: Inventory, setting: Setting, *, rank: int) -> int:
    """Bytes on the host beside what is held, where adapters are drawn one after the other; else 0.

    That is two matrices, and what is on its way to a GPU, together and one by one.
    """
    if setting.lora is None or not draws_later(setting.lora):
        return 0
    largest = max((rows * row for unit in inventory.units for rows, row in unit.adapters), default=0)
    leaves = setting.strategy.adapter_device(rank).type != "cpu"
    return 2 * largest * MADE_IN_BYTES + (2 * adapters_held(inventory, setting) if leaves else 0)
