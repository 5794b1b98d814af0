"""`peft.load-before-fill`: values of adapters are loaded into a model whose base weights are on meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.errors import NotFilledError
from surgery.passes.lifetime import showing_state, waiting_in

__all__ = ["load_adapters"]


def _bound(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return waiting_in(model) or model


@patches.register(
    "peft.load-before-fill",
    target="peft.peft_model:set_peft_model_state_dict",
    reason="PEFT looks up names in the model's state to load an adapter from a folder; a model on meta refuses it",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py",
    requires={"peft": ">=0.18"},
    subject=_bound,
)
def load_adapters(wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load them. Whole modules (`modules_to_save`) are refused: they would get the base's values by filling."""
    outer: Any = args[0] if args else kwargs["model"]
    config = outer.peft_config[args[2] if len(args) > 2 else kwargs.get("adapter_name", "default")]
    if getattr(config, "modules_to_save", None):
        raise NotFilledError("loading an adapter with modules_to_save")
    with showing_state(_bound(None, args, kwargs)):
        return wrapped(*args, **kwargs)
