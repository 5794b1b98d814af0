"""Pass `adapt`: adapters of PEFT around the model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.adapters.attach import adapted_by_peft, adapting, appearing_real, drawing_from, draws_later, leaving_blank
from surgery.adapters.stamp import adapted_undrawn
from surgery.errors import ConfigError
from surgery.passes.base import Pass
from surgery.passes.loading import Loading
from surgery.quantizers.base import format_of

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Adapt"]


@dataclass(frozen=True, kw_only=True)
class Adapt(Pass):
    """Wrap the model in a `PeftModel`: adapters in the model's dtype, base weights frozen.

    Adapters live on the device of their base weight, or on the CPU where that is on meta. Initial values are drawn from
    rank 0's generator, so that they are the same on all ranks: at once, or in a thread while the adapters are on meta,
    if nothing that PEFT builds depends on them. Those that will be read get none, and no generator goes on.
    """

    name = "adapt"

    loading: Loading
    lora: LoraConfig

    def run(self, model: nn.Module) -> nn.Module:
        """The `PeftModel`."""
        setting = self.loading.setting
        if setting.format.needs_modules and not any(format_of(module) for module in model.modules()):
            raise ConfigError("no module is quantized yet: adapt comes after replace")
        with adapting(model):
            return self._adapted(model)

    def _adapted(self, model: nn.Module) -> nn.Module:
        setting = self.loading.setting
        if not draws_later(self.lora):
            own = torch.random.fork_rng(devices=()) if setting.adapter is not None else contextlib.nullcontext()
            with own, drawing_from(self.loading.job.rng_state), appearing_real(model), leaving_blank([self.lora]):
                return adapted_by_peft(model, self.lora, setting.dtype)
        adapted, values = adapted_undrawn(model, self.lora, setting.dtype)
        self.loading.draw(values if setting.adapter is None else replace(values, steps=()))
        return adapted
