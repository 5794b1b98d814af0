"""`accelerate.no-second-wrapper`: accelerate wraps no sharded model in DDP, and no model of DDP a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.sharding.base import ShardStrategy, strategy_of

__all__ = ["wrap_once"]


def _model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return model


@patches.register(
    "accelerate.no-second-wrapper",
    target="accelerate.accelerator:Accelerator.prepare_model",
    reason=(
        "without FSDP in its configuration, accelerate wraps in DDP what is sharded already, and Trainer would save "
        "one rank's part of it; what is in DDP already it wraps again"
    ),
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, model, device_placement=None, evaluation_mode=False)",
    subject=_model,
    on_unknown="skip",
    on_drift="skip",
)
def wrap_once(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Prepare a model of DDP without DDP; refuse one of FSDP unless accelerate is configured for that."""
    from accelerate.utils import DistributedType

    label = strategy_of(_model(instance, args, kwargs)).label
    by_fsdp1 = instance.distributed_type == DistributedType.FSDP and not instance.is_fsdp2
    if label in (ShardStrategy.label, "FSDP1" if by_fsdp1 else None) or instance.is_fsdp2:  # which asks elsewhere
        return wrapped(*args, **kwargs)
    if label == "DDP" and not by_fsdp1:
        return wrapped(_model(instance, args, kwargs), device_placement=False, evaluation_mode=True)
    if label == "DDP":
        raise ConfigError("accelerate is configured for FSDP1, but this model is under DDP: build it without shard")
    raise ConfigError(
        f"this model is sharded by {label}, but accelerate is not configured for that, and would take it for a whole "
        f"one: set fsdp=True and fsdp_config={{'version': {label[-1]}}} in the training arguments, or give the "
        f"Accelerator fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version={label[-1]})"
    )
