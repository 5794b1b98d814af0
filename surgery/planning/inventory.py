"""What a model is made of, as far as its memory goes: sizes of tensors by FSDP unit, features by decoder block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from surgery.adapters.rehearsal import Trained
from surgery.model.fqn import split
from surgery.model.tree import Site, decoder_blocks, ends_of
from surgery.passes.targets import Target
from surgery.sharding.partition import Form

__all__ = ["Inventory", "Unit", "take_inventory"]

EMBEDDING, TAIL, ROOT = "embedding", "tail", "root"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What FSDP2 gathers together.

    name: a decoder block's FQN, or one of `embedding`, `tail` (the last norm and the head) and `root` (the rest).
    weights: rows, and bytes of a row, of each frozen tensor. adapters: rows and elements of a row.
    features: of a decoder block: what its linear layers take and give, in elements a token; 0 for the others.
    """

    name: str
    weights: tuple[tuple[int, int], ...]
    adapters: tuple[tuple[int, int], ...]
    features: int = 0

    def weight_bytes(self, shards: int = 1, *, position: int | None = None) -> int:
        """Bytes of the weights, or of one of `shards` parts: padded to the largest one, or of that at `position`."""
        return sum(_rows(rows, shards, position) * row for rows, row in self.weights)

    def adapter_elements(self, shards: int = 1, *, position: int | None = None) -> int:
        """The same of the adapters, in elements."""
        return sum(_rows(rows, shards, position) * row for rows, row in self.adapters)


def _rows(rows: int, shards: int, position: int | None) -> int:
    largest = -(-rows // shards)
    return largest if position is None else max(min(largest, rows - position * largest), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inventory:
    """targets: what a checkpoint fills, in the order in which it is loaded. units: decoder blocks first, in order.

    unsharded: bytes of parameters that are in no unit, whole on every rank.
    hidden: elements a token between blocks. vocabulary: outputs of the head, 0 without one. ignored, initialized:
    names of the checkpoint that nothing is made of, and of buffers that it lacks; see `WeightPlan`.
    """

    targets: tuple[Target, ...]
    units: tuple[Unit, ...]
    unsharded: int
    hidden: int
    vocabulary: int
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements that the checkpoint fills."""
        return sum(target.form.numel for target in self.targets)

    @cached_property
    def forms(self) -> dict[tuple[Form, int], int]:
        """Kinds of tensors, by form and by bytes of a stored row -> how many there are."""
        found: dict[tuple[Form, int], int] = {}
        for target in self.targets:
            kind = target.form, row_bytes(target)
            found[kind] = found.get(kind, 0) + 1
        return found

    @property
    def blocks(self) -> tuple[Unit, ...]:
        """The decoder blocks."""
        return tuple(unit for unit in self.units if unit.name not in (EMBEDDING, TAIL, ROOT))

    def unit(self, name: str) -> Unit | None:
        """The unit of that name, if there is one."""
        return next((unit for unit in self.units if unit.name == name), None)

    @property
    def adapter_elements(self) -> int:
        """Of all adapters, whole."""
        return sum(unit.adapter_elements() for unit in self.units)


def row_bytes(target: Target) -> int:
    """Bytes of one stored row of `target`."""
    return target.shape[1:].numel() * target.dtype.itemsize


def take_inventory(
    model: nn.Module, targets: Sequence[Target], trained: Sequence[Trained], *, unsharded: Collection[str]
) -> Inventory:
    """Of `model`, on meta, its linear modules replaced and not adapted yet. trained: what will be, of it and beside it.

    unsharded: FQNs of parameters. What is trained in place is counted with the adapters, as what has a gradient, and
    not with the frozen weights.
    """
    blocks = decoder_blocks(model)
    unit_of = _unit_of(model, blocks)
    weights: dict[str, list[tuple[int, int]]] = {}
    adapters: dict[str, list[tuple[int, int]]] = {}
    in_place = {each.fqn for each in trained if each.is_base}
    for target in targets:
        if not target.form.is_buffer and target.fqn not in unsharded and target.fqn not in in_place:
            name = unit_of.get(target.places[0][0], ROOT)
            weights.setdefault(name, []).append((target.form.rows, row_bytes(target)))
    unit_at = {name: unit_of[module] for name, module in model.named_modules() if module in unit_of}
    for each in trained:
        adapters.setdefault(_unit_at(each.fqn, unit_at), []).append((each.shape[0], each.shape[1:].numel()))
    features = {block.fqn: sum(map(_features, block.module.modules())) for block in blocks}
    return Inventory(
        targets=tuple(targets),
        units=tuple(
            Unit(
                name=name,
                weights=tuple(weights.get(name, ())),
                adapters=tuple(adapters.get(name, ())),
                features=features.get(name, 0),
            )
            for name in (*features, EMBEDDING, TAIL, ROOT)
            if name in weights or name in adapters
        ),
        unsharded=sum(target.nbytes for target in targets if target.fqn in unsharded),
        hidden=_hidden(model, blocks),
        vocabulary=_vocabulary(model),
    )


def _unit_of(model: nn.Module, blocks: Sequence[Site]) -> dict[nn.Module, str]:
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


def _features(module: nn.Module) -> int:
    """What goes into a linear layer and comes out, for a token; of fused experts, into those that are active."""
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
