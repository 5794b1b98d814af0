"""Quantize the loaded weights of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.passes.base import Layer, Pass
from surgery.placement import Residence
from surgery.quantizers.base import Quantizer

__all__ = ["Quantize"]


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Every quantized module of the layer gets its packed weight and `quant_state`, on the compute device.

    On a rank that keeps no data the packed weight is on meta from the start: only its statistics are kept.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"loaded"})
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized"})

    quantizer: Quantizer
    residence: Residence

    def run_layer(self, layer: Layer) -> None:
        """Quantize the sites of `layer` that are quantized modules."""
        for site in layer.sites:
            if not self.quantizer.is_quantized(site.module):
                continue
            self.quantizer.quantize(
                site.module,
                site.module.weight.detach(),  # type: ignore[operator]  # a tensor, which nn.Module cannot promise
                device=self.residence.compute_device,
                keep_packed=self.residence.keeps_data,
            )
