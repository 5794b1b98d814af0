"""What a quantizer back end does for the passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Quantizer"]


class Quantizer(Protocol):
    """Replaces linear modules by quantized ones on meta, and makes what fills them, range by range."""

    @property
    def blocksize(self) -> int:
        """Elements that share one statistic."""
        ...

    def run_elements(self, device: torch.device) -> int:
        """How many elements to quantize at once on `device`: whole blocks."""
        ...

    def replacement(self, linear: nn.Module) -> nn.Module:
        """A quantized module for `linear`, on meta, its weight in the shape and dtype in which it will be stored."""
        ...

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether `module` is one of ours, and its `weight` is to be quantized."""
        ...

    def logical(self, module: nn.Module) -> torch.Size:
        """The shape of the weight of a quantized `module` before it was quantized."""
        ...

    def quantize(self, run: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(packed uint8, float32 statistics)` of a flat run of whole blocks, in any floating dtype, on its device.

        Only the last block of a weight may be partial. It is cast to `dtype` first; None is the model's.
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
