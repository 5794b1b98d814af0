"""Move a layer's packed weights to where they wait; `quant_state` stays on the compute device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.passes.base import Layer, Pass
from surgery.placement import Residence
from surgery.quantizers.base import Quantizer
from surgery.quantizers.bnb import as_params4bit

__all__ = ["Relocate"]


@dataclass(frozen=True, kw_only=True)
class Relocate(Pass):
    """After: packed weights are on the rank's data device, every one with its own `quant_state` on the compute device.

    The parameter is rebuilt around the moved data rather than moved: `Params4bit.to` takes the shared `quant_state`
    along (bitsandbytes 0.43.0 to 0.50.2).
    """

    name: ClassVar[str] = "relocate"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})
    ensures: ClassVar[frozenset[str]] = frozenset({"placed"})

    quantizer: Quantizer
    residence: Residence

    def run_layer(self, layer: Layer) -> None:
        """Move the packed weights of `layer`."""
        for site in layer.sites:
            module: Any = site.module
            if not self.quantizer.is_quantized(module):
                continue
            data = module.weight.data
            if data.device == self.residence.data_device:
                continue
            moved = data.to(self.residence.data_device)
            module.weight = as_params4bit(moved, module, module.quant_state)
