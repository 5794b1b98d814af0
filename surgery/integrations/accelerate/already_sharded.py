"""`accelerate.already-sharded`: accelerate takes a model that is sharded already as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.sharding.base import ShardStrategy, strategy_of

__all__ = ["leave_as_it_is"]


def _model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return model


def classes_are_renamed() -> bool:
    """Whether accelerate finds a class no more once FSDP2 has renamed it."""
    from accelerate.utils.dataclasses import get_module_class_from_name

    renamed = type("FSDPLinear", (nn.Linear,), {})
    return get_module_class_from_name(renamed(1, 1, device="meta"), "Linear") is None


@patches.register(
    "accelerate.already-sharded",
    target="accelerate.utils.dataclasses:FullyShardedDataParallelPlugin.set_auto_wrap_policy",
    reason=(
        "FSDP2 renames the classes of what it shards (LlamaDecoderLayer, FSDPLlamaDecoderLayer), so that accelerate "
        "does not find the classes to shard in a model that is sharded already, before it leaves that as it is"
    ),
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/dataclasses.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, model)",
    subject=_model,
    on_unknown="skip",
    on_drift="skip",
    probe=classes_are_renamed,
)
def leave_as_it_is(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Look for no classes in a model that is sharded; options that could not take effect any more are refused."""
    label = strategy_of(_model(instance, args, kwargs)).label
    if label == ShardStrategy.label:
        return wrapped(*args, **kwargs)
    if label != f"FSDP{instance.fsdp_version}":
        raise ConfigError(
            f"expected a model that is whole, or sharded by FSDP{instance.fsdp_version} as accelerate is configured, found "
            f"one under {label}: configure accelerate, or build the model, for the other of both"
        )
    if instance.activation_checkpointing:
        raise ConfigError(
            "activation_checkpointing of FSDP's configuration comes before sharding, but this model is sharded: leave "
            "it out, and set gradient_checkpointing=True in the arguments, or call surgery.checkpoint_activations(model)"
        )
    return None
