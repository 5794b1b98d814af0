"""No quantization: linear layers stay as the checkpoint has them, in 16 or 32 bits, frozen under adapters."""

from __future__ import annotations

from torch import nn

from surgery.checkpoint import PackedSettings
from surgery.quantizers.base import QuantFormat, register

__all__ = ["Unquantized"]


class Unquantized(QuantFormat):
    """The format of `quant=None`: it takes no module."""

    label = "unquantized"
    needs_modules = False

    def takes(self, module: nn.Module) -> bool:
        """False, of every module."""
        return False

    def options_for(self, packing: PackedSettings) -> None:
        """None: packed weights are dequantized as they are read."""
        return


register(type(None), Unquantized)
