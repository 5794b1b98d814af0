"""Quantizing of one weight that is made in memory, into the tensors that an output has of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from surgery.model.fqn import join
from surgery.passes.replace import Replace, held_packed, quantizable
from surgery.quantizers.base import QuantFormat, check_run
from surgery.writing.output import Output, Planned, finite

__all__ = ["Packer", "StackPacker", "format_among", "planned_beside", "planned_packed", "quantized_in", "write_state"]


def planned_beside(name: str, quant: QuantFormat, shape: Sequence[int]) -> Iterator[Planned]:
    """The tensors and texts beside the packed weight `name` of logical `shape`."""
    for end, of in quant.saved_shapes(torch.Size(shape)).items():
        known = {} if of is None else {"dtype": of[0]}
        yield Planned(name=f"{name}.{end}", shape=None if of is None else of[1], **known)


def planned_packed(name: str, quant: QuantFormat, shape: Sequence[int], storage: torch.dtype) -> tuple[Planned, ...]:
    """The packed weight `name` of logical `shape`, in `storage`, and what is beside it."""
    rows = quant.layout(None, "").packed_shape(shape, storage)
    return (Planned(name=name, dtype=storage, shape=rows), *planned_beside(name, quant, shape))


def quantized_in(
    model: Any, formats: Sequence[QuantFormat], *, packed: frozenset[str] = frozenset()
) -> tuple[dict[str, QuantFormat], dict[str, Any], tuple[str, ...]]:
    """FQN -> format of the weights of `model`, on meta, that are quantized; its `quantization_config` then; left out.

    The last are FQNs of weights that stay in 16 bits though their kind is quantized. `model` is changed.
    packed: FQNs of weights that a checkpoint has packed, which others in these formats are not.
    """
    chosen = held_packed(model, formats, packed) if packed else quantizable(model, formats)
    for quant, found in chosen.items():
        Replace(quant=quant, chosen=found).run(model)
    weights = {
        join(site.fqn, name): quant
        for quant, found in chosen.items()
        for site in found
        for name in quant.weight_names(site.module)
    }
    left_out = tuple(name for quant in formats for name in quant.left_out(model))
    return weights, model.config.quantization_config.to_dict(), left_out


def format_among(formats: Sequence[QuantFormat], kind: QuantFormat | None) -> QuantFormat | None:
    """The one of `formats` that is for the same modules as `kind`; None if there is none, or they are to be left."""
    found = next((each for each in formats if type(each) is type(kind)), None)
    return None if found is not None and found.by_expert and not found.options.experts else found


def write_state(out: Output, name: str, saved: Mapping[str, torch.Tensor | str]) -> None:
    """Write what `QuantFormat.saved` gives of the state of the packed weight `name`.

    Raises `ExportError` for statistics that are not finite.
    """
    for end, value in saved.items():
        if isinstance(value, str):
            out.write_state(f"{name}.{end}", value)
        else:
            out.write(f"{name}.{end}", finite(value, name))


class Packer:
    """The quantization of one weight, which comes in parts. made: the tensors that it becomes, the packed one first."""

    def __init__(self, quant: QuantFormat, shape: torch.Size, made: Sequence[Planned], out: Output) -> None:
        self._quant, self._shape, self._made, self._out = quant, shape, made, out
        self._layout = quant.layout(None, "weight")
        self._left = torch.empty(0)
        self._statistics: list[torch.Tensor] = []
        self._done = 0

    def add(self, part: torch.Tensor, start: int) -> None:
        """Quantize the elements from `start` on, which follow those before, as far as they are whole blocks."""
        flat = part.reshape(-1)
        flat = torch.cat([self._left.to(flat.dtype), flat]) if self._left.numel() else flat
        is_last = start + part.numel() == self._shape.numel()
        size = flat.numel() if is_last else flat.numel() // self._layout.blocksize * self._layout.blocksize
        step = self._layout.whole_blocks(self._quant.run_elements(flat.device))
        for first in range(0, size, step):
            self._quantize(flat[first : min(first + step, size)], flat.dtype)
        self._left = flat[size:].clone()
        if is_last:
            self._finish(flat.dtype)

    def _quantize(self, run: torch.Tensor, dtype: torch.dtype) -> None:
        packed, statistics = self._quant.quantize(run, self._layout, dtype)
        check_run(self._quant, self._made[0].name, run.numel(), (packed, statistics), self._layout)
        self._statistics.append(statistics)
        self._out.write(self._made[0].name, packed.view(self._made[0].dtype), self._done)
        self._done += packed.numel() // self._made[0].dtype.itemsize

    def _finish(self, dtype: torch.dtype) -> None:
        (state,) = self._quant.states([torch.cat(self._statistics)], [self._shape], [dtype])
        write_state(self._out, self._made[0].name, self._quant.saved(state))


class StackPacker:
    """The quantization of a stack of experts, which come in runs. made: the tensors that it becomes."""

    def __init__(self, quant: QuantFormat, shape: torch.Size, made: Sequence[Planned], out: Output) -> None:
        self._quant, self._shape, self._made, self._out = quant, shape, made[0], out

    def add(self, part: torch.Tensor, start: int) -> None:
        """Quantize whole experts, from flat element `start` on."""
        name, storage = self._made.name, self._made.dtype
        layout, flat, found = self._quant.layout(None, name), part.reshape(-1), []
        step = layout.whole_blocks(self._quant.run_elements(flat.device))
        for first in range(0, flat.numel(), step):
            packed, statistics = self._quant.quantize(flat[first : first + step], layout, part.dtype)
            self._out.write(name, packed.view(storage), (start + first) // 2 // storage.itemsize)
            found.append(statistics)
        numel = self._shape[1:].numel()
        experts = range(start // numel, (start + flat.numel()) // numel)
        shape = torch.Size((len(experts), *self._shape[1:]))
        (state,) = self._quant.states([torch.cat(found)], [shape], [part.dtype])
        self.add_state(state, experts)

    def add_state(self, state: Any, experts: range) -> None:
        """Write the statistics of some experts; with those of the first what all share."""
        name = self._made.name
        for end, section in self._quant.saved_by_expert(state).items():
            self._out.write(f"{name}.{end}", finite(section, name), section.numel() // len(experts) * experts.start)
        if experts.start == 0:
            write_state(self._out, name, self._quant.saved_once(self._shape))
