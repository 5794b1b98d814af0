"""What a quantizer back end does for the passes, and the sizes that it has to keep to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from surgery.errors import QuantizerError

__all__ = ["Quantizer", "check_layout", "check_run", "check_runs"]


class Quantizer(Protocol):
    """Replaces linear modules by quantized ones on meta, and makes what fills them, range by range.

    The layout is fixed, since ranks divide weights by it: two elements make a byte, in the order of the flat weight, an
    odd last element takes a byte of its own, and a block of `blocksize` elements has one float32 statistic. Another
    one, such as a byte an element, is refused as `QuantizerError`: by `check_layout` before anything is read, and by
    `check_run` when a run comes out of `quantize`.
    """

    @property
    def blocksize(self) -> int:
        """Elements that share one statistic; even."""
        ...

    def run_elements(self, device: torch.device) -> int:
        """How many elements to quantize at once on `device`: whole blocks."""
        ...

    def replacement(self, linear: nn.Module) -> nn.Module:
        """A quantized module for `linear`, on meta, its weight in the shape and dtype in which it will be stored.

        That is `(n, 1)`, where `n` elements of that dtype have as many bytes as the packed weight.
        """
        ...

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether `module` is one of ours, and its `weight` is to be quantized."""
        ...

    def logical(self, module: nn.Module) -> torch.Size:
        """The shape of the weight of a quantized `module` before it was quantized."""
        ...

    def quantize(self, run: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(packed uint8, float32 statistics)` of a flat run of whole blocks, in any floating dtype, on its device.

        Only the last block of a weight may be partial. It is cast first, to `dtype` where one is given. Of a run of
        `n` elements, both are 1-D: `ceil(n / 2)` bytes, and `ceil(n / blocksize)` statistics.
        """
        ...

    def states(
        self,
        statistics: Sequence[torch.Tensor],
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype | None] | None = None,
    ) -> list[Any]:
        """What belongs to the packed data of whole weights of logical `shapes`, each from the statistics of all its
        blocks, float32, in order; on their device. dtypes: in which each was quantized, as above. Many weights at once
        are little more work than one.
        """
        ...

    def parameter(self, module: nn.Module, packed: torch.Tensor, state: Any) -> nn.Parameter:
        """The frozen parameter of `module` over `packed`; `state` is what `states` gave."""
        ...

    def set_state(self, module: nn.Module, state: Any) -> None:
        """Give the module its state, which it keeps whatever becomes of the parameter."""
        ...


def check_layout(quantizer: Quantizer, fqn: str, stored: torch.Tensor, logical: torch.Size) -> None:
    """Raises QuantizerError where the weight `fqn`, of shape `logical`, is `stored` on meta in another layout."""
    name, blocksize = type(quantizer).__name__, quantizer.blocksize
    if blocksize < 1 or blocksize % 2:
        raise QuantizerError(
            f"{name}: expected an even blocksize, since two elements make a byte, found {blocksize}: choose another"
        )
    expected, found = -(-logical.numel() // 2), stored.numel() * stored.dtype.itemsize
    if found != expected or stored.shape[1:].numel() != 1:
        raise QuantizerError(
            f"{name}: expected {fqn}, of shape {tuple(logical)}, to be stored as (n, 1) in {expected} bytes, two "
            f"elements a byte; found {tuple(stored.shape)} of {stored.dtype}, {found} bytes: other layouts cannot be "
            "divided among ranks; make `replacement` and `quantize` keep to the one that Quantizer describes"
        )


def check_runs(quantizer: Quantizer, device: torch.device) -> None:
    """Raises QuantizerError where runs on `device` are not whole blocks."""
    elements = quantizer.run_elements(device)
    if elements < 1 or elements % quantizer.blocksize:
        raise QuantizerError(
            f"{type(quantizer).__name__}: expected runs of whole blocks of {quantizer.blocksize} elements, found "
            f"run_elements({str(device)!r}) of {elements}: return a multiple"
        )


def check_run(
    quantizer: Quantizer, fqn: str, run: torch.Tensor, packed: torch.Tensor, statistics: torch.Tensor
) -> None:
    """Raises QuantizerError where what `quantize` has made of `run`, a part of `fqn`, is not of the promised sizes."""
    blocks = -(-run.numel() // quantizer.blocksize)
    expected = _described(torch.uint8, -(-run.numel() // 2)), _described(torch.float32, blocks)
    found = tuple(f"{each.dtype} {tuple(each.shape)}" for each in (packed, statistics))
    if found != expected:
        raise QuantizerError(
            f"{type(quantizer).__name__}: expected `quantize` to make of {run.numel()} elements of {fqn} packed data "
            f"{expected[0]}, two elements a byte, and statistics {expected[1]}, one for each block of "
            f"{quantizer.blocksize}; found {found[0]} and {found[1]}"
        )


def _described(dtype: torch.dtype, size: int) -> str:
    return f"{dtype} {(size,)}"
