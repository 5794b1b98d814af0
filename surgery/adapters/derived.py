"""Values of adapters that are made of base weights: magnitudes of DoRA, and rows of which tokens are trained.

PEFT takes them from whole weights, as soon as it adds an adapter. A model that is adapted on meta has no weights then,
so that it leaves them blank (see `surgery.adapters.attach.appearing_real`), and no rank may ever have a whole one. Here
a value is the sum, over all ranks, of what each finds in the part of the weight that it alone has made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.model.tree import modules_of
from surgery.sharding.base import own_part

__all__ = ["Derived", "Magnitude", "Rows", "find_derived", "is_blank", "put"]

#: A tensor's holder, and its name there; FSDP2 replaces parameters.
Place = tuple[nn.Module, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Derived:
    """A value to make of `base.weight`, and the places that are blank until then."""

    base: nn.Module
    places: tuple[Place, ...]

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros, for what a rank finds in a weight of `shape` and `dtype`; to be added up over ranks."""
        raise NotImplementedError

    def look(self, found: torch.Tensor, values: torch.Tensor, start: int, shape: torch.Size) -> None:
        """Note in `found` what there is in `values`, 1-D, from flat element `start` of a weight of `shape`."""
        raise NotImplementedError

    def value(self, found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The value, whole, once `found` is that of all ranks; dtype: in which PEFT computes."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Magnitude(Derived):
    """The norms of the rows of a weight plus its adapter's product; of its columns if `transposed`.

    delta: `(left, right)`, whose product is what LoRA adds to the weight; None where that is zero.
    """

    transposed: bool
    delta: tuple[torch.Tensor, torch.Tensor] | None = None

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:  # noqa: ARG002
        """Sums of squares, float64: a row, as ranks divide packed weights, need not end where a part does."""
        return torch.zeros(shape[1 if self.transposed else 0], dtype=torch.float64, device=device)

    def look(self, found: torch.Tensor, values: torch.Tensor, start: int, shape: torch.Size) -> None:
        """Add squares: of whole rows as the norm that PEFT takes, and of the pieces of rows before and behind them."""
        row = shape[1:].numel()
        stop = start + values.numel()
        values = self._adapted(values, start, row)
        first = min(-(-start // row) * row, stop)
        last = max(stop // row * row, first)
        for begin, end, width in ((start, first, first - start), (first, last, row), (last, stop, stop - last)):
            if begin == end:
                continue
            rows = values[begin - start : end - start].view(-1, width)
            norms = torch.linalg.vector_norm(rows, dim=0 if self.transposed else 1, dtype=torch.float32)
            at = begin % row if self.transposed else begin // row
            found[at : at + norms.numel()] += norms.to(found.device, torch.float64).square()

    def _adapted(self, values: torch.Tensor, start: int, row: int) -> torch.Tensor:
        if self.delta is None:
            return values
        left, right = self.delta
        first, last = start // row, -(-(start + values.numel()) // row)
        added = (left[first:last].to(values.device) @ right.to(values.device)).reshape(-1)
        return values + added[start - first * row :][: values.numel()]

    def value(self, found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The norms."""
        return found.sqrt().float().to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows(Derived):
    """The rows `indices` of a weight that is not packed."""

    indices: tuple[int, ...]

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Bytes: those of one rank, and zeros of all others, add up to themselves."""
        return torch.zeros(len(self.indices), shape[1:].numel() * dtype.itemsize, dtype=torch.uint8, device=device)

    def look(self, found: torch.Tensor, values: torch.Tensor, start: int, shape: torch.Size) -> None:
        """Copy the rows that are there, of which parts have whole ones."""
        rows = values.view(-1, shape[1:].numel())
        first = start // rows.shape[1]
        for place, index in enumerate(self.indices):
            if first <= index < first + rows.shape[0]:
                found[place] = rows[index - first].to(found.device).view(torch.uint8)

    def value(self, found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows, `(len(indices), columns)`."""
        return found.view(dtype)


def find_derived(model: nn.Module) -> Iterator[Derived]:
    """Everything in `model`, which PEFT has adapted, that waits for values of base weights."""
    seen: set[int] = set()
    module: Any
    for module in modules_of(model):
        for name, layer in dict(module._modules.get("lora_magnitude_vector") or {}).items():
            if is_blank(layer._parameters["weight"]):
                yield _magnitude(module, name, layer)
        indices: Any = vars(module).get("token_indices")
        for name, chosen in indices.items() if isinstance(indices, dict) else ():
            held = ((module.trainable_tokens_delta, name), (module.trainable_tokens_original, name))
            places = tuple(place for place in held if is_blank(_tensor(place)) and id(place[0]) not in seen)
            seen.update(id(place[0]) for place in places)
            if places:
                yield Rows(base=module.get_base_layer(), places=places, indices=tuple(chosen))


def _magnitude(module: Any, name: str, layer: Any) -> Magnitude:
    is_embedding = name in module.lora_embedding_A
    first = module.lora_embedding_A[name] if is_embedding else module.lora_A[name].weight
    second = module.lora_embedding_B[name] if is_embedding else module.lora_B[name].weight
    delta = None
    if second.any():
        rank = second.shape[1]
        left, right = second.detach().view(-1, rank), first.detach().view(rank, -1) * module.scaling[name]
        delta = (right.t(), left.t()) if layer.fan_in_fan_out else (left, right)
    return Magnitude(
        base=module.get_base_layer(), places=((layer, "weight"),), transposed=layer.fan_in_fan_out, delta=delta
    )


def _tensor(place: Place) -> torch.Tensor:
    module, name = place
    found = module._parameters.get(name)
    return module._buffers[name] if found is None else found  # type: ignore[return-value]  # one of both has it


def is_blank(tensor: torch.Tensor) -> bool:
    """Whether `tensor` waits for values."""
    return not tensor.is_meta and bool(tensor.isnan().all())


def put(place: Place, value: torch.Tensor) -> None:
    """Fill what this rank has at `place` with its part of `value`, which is whole."""
    part = own_part(_tensor(place))
    part.data.copy_(value.reshape(-1)[part.start : part.start + part.data.numel()].view(part.data.shape))
