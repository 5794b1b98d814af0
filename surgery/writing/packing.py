"""Quantizing of one weight that is made in memory, into the tensors that an output has of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from surgery.passes.replace import Replace, quantizable
from surgery.quantizers.base import QuantFormat, check_run
from surgery.writing.output import Output, Planned, finite

__all__ = ["Packer", "planned_beside", "quantized_in", "write_state"]


def planned_beside(name: str, quant: QuantFormat, numel: int) -> Iterator[Planned]:
    """The tensors and texts beside the packed weight `name` of `numel` elements."""
    for end, of in quant.saved_shapes(numel).items():
        known = {} if of is None else {"dtype": of[0]}
        yield Planned(name=f"{name}.{end}", shape=None if of is None else of[1], **known)


def quantized_in(model: Any, quant: QuantFormat) -> tuple[frozenset[str], dict[str, Any]]:
    """FQNs of the modules of `model`, on meta, that are quantized, and its `quantization_config` then.

    `model` is changed.
    """
    chosen = quantizable(model, (quant,))[quant]
    Replace(quant=quant, chosen=chosen).run(model)
    return frozenset(site.fqn for site in chosen), model.config.quantization_config.to_dict()


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
