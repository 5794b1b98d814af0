"""`peft.adapters-of-meta`: adapters of a model on meta keep their initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.adapters.attach import RANDOM, appearing_real, leaving_blank
from surgery.errors import NotFilledError

__all__ = ["adapted_specimen", "keep_initial_values"]


def _given_model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["model"]


def adapted_specimen(*, device: str, seed: int = 0) -> Any:
    """The smallest model on `device` with an adapter of PEFT, as the tuner that has added it."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    model = nn.Sequential(nn.Linear(2, 2, bias=False, device="meta").to_empty(device=device))
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return LoraModel(model, LoraConfig(r=1, target_modules=["0"]), "default")


def adapters_are_on_meta() -> bool:
    """Whether PEFT puts the adapter of a weight on meta there too."""
    added = adapted_specimen(device="meta").model[0].lora_A["default"].weight
    return bool(added.is_meta)


def check_keeps_values() -> None:
    """Raise RuntimeError if an adapter of a weight on meta has no values."""
    tuner = adapted_specimen(device="meta")
    tuner.peft_config["second"] = tuner.peft_config["default"]
    with torch.random.fork_rng(devices=()):
        keep_initial_values(tuner.inject_adapter, tuner, (tuner.model, "second"), {})
    layer = tuner.model[0]
    if layer.lora_A["second"].weight.is_meta or not layer.base_layer.weight.is_meta:
        raise RuntimeError("expected an adapter with values around a weight on meta, found another device")


@patches.register(
    "peft.adapters-of-meta",
    target="peft.tuners.tuners_utils:BaseTuner.inject_adapter",
    reason="PEFT moves new adapters to the device of their base weight; on meta their initial values are lost",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py",
    requires={"peft": ">=0.18,<0.22"},
    signature="(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None)",
    fingerprint=("5d7a11f2147b04da", "5a332736d769f1fe", "5f4330bd4fd8cd49"),  # until 0.18, until 0.20, since 0.21
    subject=_given_model,
    probe=adapters_are_on_meta,
    verify=check_keeps_values,
)
def keep_initial_values(
    wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Keep adapters on the CPU with their values, around base weights on meta."""
    model: nn.Module = _given_model(_instance, args, kwargs)
    for config in _instance.peft_config.values():
        init = getattr(config, "init_lora_weights", True)
        if init not in (*RANDOM, "orthogonal", "eva"):  # the last of which comes later, by a call of its own
            raise NotFilledError(f"init_lora_weights={init!r} of LoRA")
    with appearing_real(model), leaving_blank(_instance.peft_config.values()):
        return wrapped(*args, **kwargs)
