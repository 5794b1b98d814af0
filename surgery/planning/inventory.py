"""The sizes that a model's memory depends on: of tensors by unit, of features by decoder block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from surgery.model.fqn import split
from surgery.model.tree import Site, decoder_blocks, ends_of
from surgery.passes.prepare import Prepared
from surgery.passes.tensors import Target
from surgery.quantizers.base import QuantFormat
from surgery.sharding.base import Unit
from surgery.sharding.partition import Form

__all__ = ["Inventory", "UnitTensors", "row_bytes", "take_inventory"]

BLOCK, EMBEDDING, TAIL, ROOT = "block", "embedding", "tail", "root"


@dataclass(frozen=True, kw_only=True)
class UnitTensors:
    """The tensors of a unit, by their rows, along which they are divided.

    kind: as of a `Unit`. weights: rows, and bytes of a row, of each frozen tensor. adapters: rows, and elements of a
    row. features: elements a token that the linear layers of a block take and give; 0 for other kinds.
    """

    kind: str
    weights: tuple[tuple[int, int], ...]
    adapters: tuple[tuple[int, int], ...]
    features: int = 0

    def weight_bytes(self, shards: int = 1) -> int:
        """Bytes of the weights, or of one of `shards` parts, padded to the largest one."""
        return sum(-(-rows // shards) * row for rows, row in self.weights)

    def adapter_elements(self, shards: int = 1, *, position: int | None = None) -> int:
        """Elements of the adapters, or of one of `shards` parts: padded to the largest one, or that at `position`."""
        return sum(_rows(rows, shards, position) * row for rows, row in self.adapters)

    def whole(self, dtype: torch.dtype) -> Unit:
        """The unit in bytes, with adapters in `dtype`."""
        return Unit(kind=self.kind, weights=self.weight_bytes(), adapters=self.adapter_elements() * dtype.itemsize)


def _rows(rows: int, shards: int, position: int | None) -> int:
    largest = -(-rows // shards)
    return largest if position is None else max(min(largest, rows - position * largest), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inventory:
    """The tensors of a model, and the sizes that activations depend on.

    targets: what a checkpoint fills, in the order in which it is loaded. units: decoder blocks first, in order.
    unsharded: bytes of parameters that are in no unit, whole on every rank.
    hidden: elements a token between blocks. vocabulary: outputs of the head, 0 without one.
    ignored, initialized: names as `Prepared` has them.
    """

    targets: tuple[Target, ...]
    units: tuple[UnitTensors, ...]
    unsharded: int
    hidden: int
    vocabulary: int
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of elements that the checkpoint fills."""
        return sum(target.form.numel for target in self.targets)

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
        return tuple(unit.whole(dtype) for unit in self.units)


def row_bytes(target: Target) -> int:
    """Bytes of one stored row of `target`."""
    return target.shape[1:].numel() * target.dtype.itemsize


def take_inventory(prepared: Prepared) -> Inventory:
    """The inventory of a prepared model.

    What is trained in place is counted with the adapters, as what has a gradient, and not with the frozen weights.
    """
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
    for each in prepared.trained:
        adapters.setdefault(_unit_at(each.fqn, unit_at), []).append((each.shape[0], each.shape[1:].numel()))
    quant = prepared.setting.format
    features = {block.fqn: sum(_features(each, quant) for each in block.module.modules()) for block in blocks}
    return Inventory(
        targets=prepared.targets,
        units=tuple(
            UnitTensors(
                kind=BLOCK if name in features else name,
                weights=tuple(weights.get(name, ())),
                adapters=tuple(adapters.get(name, ())),
                features=features.get(name, 0),
            )
            for name in (*features, EMBEDDING, TAIL, ROOT)
            if name in weights or name in adapters
        ),
        unsharded=sum(target.nbytes for target in prepared.targets if target.fqn in prepared.unsharded),
        hidden=_hidden(model, blocks),
        vocabulary=_vocabulary(model),
        ignored=prepared.ignored,
        initialized=prepared.initialized,
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


def _features(module: nn.Module, quant: QuantFormat) -> int:
    """Elements a token that a linear layer takes and gives; for fused experts those of the active ones."""
    if quant.is_quantized(module):
        return sum(quant.logical(module))
    if isinstance(module, nn.Linear):
        return module.in_features + module.out_features
    config = getattr(module, "config", None)
    active = getattr(config, "num_experts_per_tok", None) or 1
    fused = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    return sum(active * (p.shape[1] + p.shape[2]) for p in fused)


def _hidden(model: nn.Module, blocks: Sequence[Site]) -> int:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[1]
    inputs = (m.in_features for site in blocks for m in site.module.modules() if isinstance(m, nn.Linear))
    return next(inputs, 0)


def _vocabulary(model: nn.Module) -> int:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head.out_features if isinstance(head, nn.Linear) else 0
