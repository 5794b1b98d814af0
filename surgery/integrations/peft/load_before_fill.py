"""`peft.load-before-fill`: values of adapters are loaded into a model whose base weights are on meta."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

from torch import nn

import model_surgery_patches as patches
from surgery.errors import NotFilledError
from surgery.integrations.peft.adapters_of_meta import adapted_specimen
from surgery.passes.lifetime import showing_state, waiting_in

__all__ = ["load_adapters"]


def _bound(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return waiting_in(model) or model


def state_is_looked_at() -> bool:
    """Whether PEFT asks a model for its state to load an adapter into it."""
    from peft import set_peft_model_state_dict

    def refuse(*_args: object, **_options: object) -> NoReturn:
        raise NotFilledError("state_dict()")

    model = adapted_specimen(device="cpu")
    vars(model.model)["state_dict"] = refuse
    try:
        set_peft_model_state_dict(model, {})
    except NotFilledError:
        return True
    return False


def check_refuses_modules() -> None:
    """Raise RuntimeError if whole modules are loaded, which filling would overwrite."""
    model = SimpleNamespace(peft_config={"default": SimpleNamespace(modules_to_save=["head"])})
    try:
        load_adapters(lambda *_args, **_options: None, None, (model, {}), {})
    except NotFilledError:
        return
    raise RuntimeError("expected modules_to_save to be refused")


@patches.register(
    "peft.load-before-fill",
    target="peft.peft_model:set_peft_model_state_dict",
    reason="PEFT looks up names in the model's state to load an adapter from a folder; a model on meta refuses it",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py",
    requires={"peft": ">=0.18,<0.22"},
    signature="(model, peft_model_state_dict, adapter_name='default', ignore_mismatched_sizes=False, "
    "low_cpu_mem_usage=False)",
    fingerprint=(
        "a4ba475f556e20a7",  # 0.18
        "e5de81f71478e698",  # 0.19
        "ecb7c69fc742f1d8",  # 0.20
        "aef238a4c098bc78",  # 0.21.0
        "744007ae59cf6320",  # 0.21.1 and 0.21.2
    ),
    subject=_bound,
    probe=state_is_looked_at,
    verify=check_refuses_modules,
)
def load_adapters(wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load them. Whole modules (`modules_to_save`) are refused: they would get the base's values by filling."""
    outer: Any = args[0] if args else kwargs["model"]
    config = outer.peft_config[args[2] if len(args) > 2 else kwargs.get("adapter_name", "default")]
    if getattr(config, "modules_to_save", None):
        raise NotFilledError("loading an adapter with modules_to_save")
    with showing_state(_bound(None, args, kwargs)):
        return wrapped(*args, **kwargs)
