"""Add LoRA adapters through PEFT, on whatever device the base weights are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from surgery.errors import SelectorError
from surgery.passes.base import Pass

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Adapt", "check_targets"]


def check_targets(model: nn.Module, lora: LoraConfig) -> None:
    """Raise `SelectorError` if PEFT would find no module for `lora` in `model`, which may be on meta."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if getattr(lora, "target_parameters", None):  # since peft 0.17
        return
    config: Any = copy.deepcopy(lora)
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        config.target_modules = set(DEFAULTS.get(model_type, ()))
    config = _maybe_include_all_linear_layers(config, model)
    names = [name for name, _ in model.named_modules() if name]
    if any(check_target_module_exists(config, name) for name in names):
        return
    wanted = sorted(config.target_modules) if isinstance(config.target_modules, set) else [str(config.target_modules)]
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")})
    raise SelectorError(
        f"lora.target_modules: {', '.join(map(repr, wanted)) or 'nothing'} matches no module of "
        f"{type(model).__name__}. Modules with weights are called: {', '.join(leaves)}",
        patterns=wanted,
    )


@dataclass(frozen=True, kw_only=True)
class Adapt(Pass):
    """Wraps the model by `peft.get_peft_model`; adapters are in `dtype`, base weights are frozen.

    Adapters live on the device of their base weight, so on meta where that is: rank 0's values come with the
    broadcast that FSDP does while wrapping.
    """

    name: ClassVar[str] = "adapt"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"adapted"})

    lora: LoraConfig
    dtype: torch.dtype

    def run(self, model: nn.Module) -> nn.Module:
        """The `PeftModel`."""
        from peft import get_peft_model

        # What transformers sets on a model that it loads in 4 bits, and what PEFT looks at to choose its LoRA layer.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        adapted = get_peft_model(model, copy.deepcopy(self.lora), autocast_adapter_dtype=False)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        return adapted
