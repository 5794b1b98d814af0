"""`trl.fill-reference`: a bound reference model is filled with each rank's shard, as the one that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in

__all__ = ["fill_reference"]

ID = "trl.fill-reference"


@patches.register(
    ID,
    target="trl.models.utils:prepare_fsdp",
    aliases="rewrite",  # trainers import it by name
    reason="TRL shards a reference model by itself, as one group, and not by accelerate, which would fill it",
    upstream="https://github.com/huggingface/trl/blob/v1.16.0/trl/models/utils.py",
    requires={"trl": ">=1.15,<1.17"},
    signature="(model, accelerator)",
    subject=lambda _instance, args, kwargs: args[0] if args else kwargs["model"],
    on_unknown="skip",
    on_drift="skip",
)
def fill_reference(
    wrapped: Callable[..., nn.Module], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    """Have accelerate prepare a bound model, which fills it; TRL leaves sharded models as they are."""
    given = dict(zip(("model", "accelerator"), args, strict=False)) | kwargs
    model, accelerator = given["model"], given["accelerator"]
    if bound_in(model) is None:
        patches.passed(ID)
        return wrapped(**given)
    from accelerate import accelerator as module

    prepared: nn.Module
    if accelerator.is_fsdp2:
        prepared = module.fsdp2_prepare_model(accelerator, model)
    else:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        accelerator._models.remove(prepared)  # it is not to be saved with the state
    return prepared.eval()
