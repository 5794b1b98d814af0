"""Read a layer's tensors from the checkpoint and set them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from surgery.checkpoint import Index, Reader, TensorEntry
from surgery.errors import WeightsMismatchError
from surgery.fqn import split
from surgery.passes.base import Layer, Pass
from surgery.placement import Residence
from surgery.quantizers.base import Quantizer
from surgery.walk import Site
from surgery.weights import Assignment

__all__ = ["Load", "group_into_layers"]

#: Elements of a tensor that are read at a time to be compared with another.
COMPARED_AT_ONCE = 1 << 22


def group_into_layers(model: nn.Module, assignments: Iterable[Assignment]) -> list[Layer]:
    """One layer per module that is filled, in the order of `assignments`; modules that share an assignment together."""
    layer_of: dict[str, tuple[list[str], list[Assignment]]] = {}
    for assignment in assignments:
        owners = list(dict.fromkeys(split(target)[0] for target in assignment.targets))
        fqns, members = _merged(layer_of, owners)
        members.append(assignment)
        for fqn in fqns:
            layer_of[fqn] = (fqns, members)
    unique = {id(members): (fqns, members) for fqns, members in layer_of.values()}
    return [
        Layer(
            sites=tuple(Site(fqn=fqn, module=model.get_submodule(fqn)) for fqn in fqns),
            assignments=tuple(members),
        )
        for fqns, members in unique.values()
    ]


def _merged(
    layer_of: dict[str, tuple[list[str], list[Assignment]]], owners: list[str]
) -> tuple[list[str], list[Assignment]]:
    """The one group of all `owners`, made of the groups that they are in already."""
    groups = {id(layer_of[fqn][1]): layer_of[fqn] for fqn in owners if fqn in layer_of}
    fqns = list(dict.fromkeys([fqn for group in groups.values() for fqn in group[0]] + owners))
    return fqns, [assignment for group in groups.values() for assignment in group[1]]


@dataclass(frozen=True, kw_only=True)
class Load(Pass):
    """Reads each source once and fills its targets.

    After: a weight that will be quantized is a plain parameter on the CPU, in the checkpoint's dtype and in logical
    shape, on every rank; everything else is in the dtype that it had on meta, on the rank's data device, and stays on
    meta, unread, on ranks that keep no data.

    tied: first FQN -> aliases, of the whole model. transposed: weights that the checkpoint holds as `(in, out)`.
    """

    name: ClassVar[str] = "load"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized-modules"})
    ensures: ClassVar[frozenset[str]] = frozenset({"loaded"})

    model: nn.Module = field(repr=False)
    index: Index = field(repr=False)
    reader: Reader
    quantizer: Quantizer
    residence: Residence
    tied: Mapping[str, tuple[str, ...]] = field(repr=False)
    transposed: frozenset[str] = field(default=frozenset(), repr=False)

    def run_layer(self, layer: Layer) -> None:
        """Fill the sites of `layer`."""
        for assignment in layer.assignments:
            wanted = [name for name in assignment.targets if self.residence.keeps_data or self._is_quantized(name)]
            if not wanted:
                continue
            tensors = assignment.convert({name: self.reader.read(self.index[name]) for name in assignment.sources})
            self._check_duplicates(assignment, tensors)
            for name in wanted:
                self._fill(name, tensors.pop(name))

    def _is_quantized(self, name: str) -> bool:
        owner, leaf = split(name)
        return leaf == "weight" and self.quantizer.is_quantized(self.model.get_submodule(owner))

    def _check_duplicates(self, assignment: Assignment, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tensors saved once more under a tied name must say the same: one of them would be lost without a word."""
        for name in assignment.duplicates:
            if self._holds(self.index[name], tensors[assignment.targets[0]]):
                continue
            raise WeightsMismatchError(
                f"{name} and {assignment.sources[0]} differ in the checkpoint, but the model ties them "
                f"({assignment.targets[0]}): set tie_word_embeddings to false in config.json if they are two",
                tensor=name,
            )

    def _holds(self, entry: TensorEntry, tensor: torch.Tensor) -> bool:
        """Whether the checkpoint has `tensor` at `entry`: compared in runs, so that it is not in memory twice."""
        if entry.dtype != tensor.dtype or entry.shape != tuple(tensor.shape):
            return False
        flat = tensor.reshape(-1)
        for start in range(0, entry.numel, COMPARED_AT_ONCE):
            run = flat[start : start + COMPARED_AT_ONCE]
            if not torch.equal(self.reader.read_range(entry, start, start + run.numel()), run):
                return False
        return True

    def _fill(self, name: str, tensor: torch.Tensor) -> None:
        if self._is_quantized(name):
            logical = tensor.t() if name in self.transposed else tensor
            self._set(name, nn.Parameter(logical, requires_grad=False))
            return
        if tensor.is_floating_point():
            owner, leaf = split(name)
            tensor = tensor.to(getattr(self.model.get_submodule(owner), leaf).dtype)
        self._set(name, tensor.to(self.residence.data_device))

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        """Put `tensor` at `name` and at every alias, as the one object that it was on meta."""
        owner, leaf = split(name)
        old = getattr(self.model.get_submodule(owner), leaf)
        is_parameter = isinstance(old, nn.Parameter)
        if is_parameter and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for alias in (name, *self.tied.get(name, ())):
            owner, leaf = split(alias)
            module = self.model.get_submodule(owner)
            tensors: Any = module._parameters if is_parameter else module._buffers
            tensors[leaf] = tensor
