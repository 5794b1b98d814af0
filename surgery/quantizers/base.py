"""What a quantizer back end does for the passes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

__all__ = ["Quantizer"]


class Quantizer(Protocol):
    """Replaces linear modules by quantized ones on meta, and fills them weight by weight."""

    def replacement(self, linear: nn.Module) -> nn.Module:
        """A quantized module for `linear`, on meta, in its logical shape."""
        ...

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether `module` is one of ours, and its `weight` is to be quantized."""
        ...

    def quantize(self, module: nn.Module, weight: torch.Tensor, *, device: torch.device, keep_packed: bool) -> None:
        """Give `module` the quantized form of `weight`, `(out, in)`; without `keep_packed`, packed data on meta."""
        ...
