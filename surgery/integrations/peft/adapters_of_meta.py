"""`peft.adapters-of-meta`: adapters of a model on meta keep their initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.adapters.attach import appearing_real
from surgery.errors import NotFilledError

__all__ = ["keep_initial_values"]


def _given_model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["model"]


@patches.register(
    "peft.adapters-of-meta",
    target="peft.tuners.tuners_utils:BaseTuner.inject_adapter",
    reason="PEFT moves new adapters to the device of their base weight; on meta their initial values are lost",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py",
    requires={"peft": ">=0.18"},
    subject=_given_model,
)
def keep_initial_values(
    wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Keep adapters on the CPU with their values, around base weights on meta."""
    model: nn.Module = _given_model(_instance, args, kwargs)
    for config in _instance.peft_config.values():
        for name in ("use_dora", "trainable_token_indices"):
            if getattr(config, name, None):
                raise NotFilledError(f"{name} of LoRA")
    with appearing_real(model):
        return wrapped(*args, **kwargs)
