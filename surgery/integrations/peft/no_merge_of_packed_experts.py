"""`peft.no-merge-of-packed-experts`: merging is refused before a layer beside the experts is merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.integrations.peft.lora_of_packed_experts import packed_specimen

__all__ = ["refuse"]


def _tuner() -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    model = nn.Sequential(packed_specimen())
    with (
        torch.random.fork_rng(devices=()),
        patches.transaction("peft.lora-of-packed-experts", reason="a probe builds an adapter"),
    ):
        return LoraModel(model, LoraConfig(r=1, target_modules=[], target_parameters=["0.w"]), "default")


def nothing_is_said() -> bool:
    """Whether PEFT finds nothing wrong in merging adapters into packed experts."""
    try:
        _tuner()._check_merge_allowed()
    except ValueError:
        return False
    return True


def check_refuses() -> None:
    """Raise RuntimeError if merging is not refused."""
    try:
        refuse(lambda: None, _tuner(), (), {})
    except ConfigError:
        return
    raise RuntimeError("expected merging into packed experts to be refused")


@patches.register(
    "peft.no-merge-of-packed-experts",
    target="peft.tuners.lora.model:LoraModel._check_merge_allowed",
    reason="PEFT merges layer after layer: what cannot be merged would leave a model that is merged in part",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/model.py",
    requires={"peft": ">=0.19,<0.22"},
    signature="(self)",
    fingerprint="157489e67e870dfe",
    probe=nothing_is_said,
    verify=check_refuses,
    subject=lambda instance, _args, _kwargs: instance.model,
)
def refuse(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ConfigError` if an adapter of packed experts is there."""
    from surgery.adapters.experts import NO_MERGE, ParamWrapper

    if any(isinstance(module, ParamWrapper) for module in instance.model.modules()):
        raise ConfigError(NO_MERGE)
    wrapped(*args, **kwargs)
