"""`accelerate.already-sharded`: accelerate takes a model that is sharded already as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.sharding.base import ShardStrategy, strategy_of

__all__ = ["leave_as_it_is", "sharded_specimen"]


def sharded_specimen() -> nn.Module:
    """The smallest model that FSDP2 has sharded, by its class, which is all that accelerate looks at."""
    from torch.distributed.fsdp import FSDPModule

    class FSDPLinear(FSDPModule, nn.Linear):
        pass

    model: nn.Module = nn.Linear(1, 1, device="meta")
    model.__class__ = FSDPLinear
    return model


def classes_are_renamed() -> bool:
    """Whether accelerate finds a class no more once FSDP2 has renamed it."""
    from accelerate.utils.dataclasses import get_module_class_from_name

    return get_module_class_from_name(sharded_specimen(), "Linear") is None


def check_prepares_others_alone() -> None:
    """Raise RuntimeError if a sharded model is handed to accelerate, or what is beside it is not."""
    from types import SimpleNamespace

    model, beside, handed = sharded_specimen(), object(), list[Any]()
    plugin, dynamo = (
        SimpleNamespace(activation_checkpointing=False),
        SimpleNamespace(backend=SimpleNamespace(value="NO")),
    )
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=dynamo)

    def prepare(*args: Any) -> tuple[Any, ...]:
        handed.extend(args)
        return args

    result = leave_as_it_is(prepare, SimpleNamespace(state=state, _models=[]), (model, beside), {})
    if result != (model, beside) or handed != [beside]:
        raise RuntimeError(f"expected all but the model to be prepared, found {handed}")


@patches.register(
    "accelerate.already-sharded",
    target="accelerate.accelerator:Accelerator._prepare_fsdp2",
    reason=(
        "before it leaves a sharded model as it is, accelerate looks for the classes to shard, which FSDP2 has renamed "
        "(LlamaDecoderLayer, FSDPLlamaDecoderLayer); one with adapters around it, it would shard again"
    ),
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, *args)",
    fingerprint="74da433b6d4ab0fc",
    subject=lambda _instance, args, _kwargs: next((each for each in args if isinstance(each, nn.Module)), None),
    on_unknown="skip",
    on_drift="skip",
    probe=classes_are_renamed,
    verify=check_prepares_others_alone,
)
def leave_as_it_is(
    wrapped: Callable[..., tuple[Any, ...]], instance: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Prepare all but the model; the optimizer has its shards. Options that come too late are refused."""
    model = next(each for each in args if isinstance(each, nn.Module))
    label = strategy_of(model).label
    if label == ShardStrategy.label:
        return wrapped(*args)
    if label != "FSDP2":
        raise ConfigError(
            f"accelerate is configured for FSDP2, but this model is under {label}: build it with "
            "shard=surgery.FSDP2(), or without shard"
        )
    if instance.state.fsdp_plugin.activation_checkpointing or instance.state.dynamo_plugin.backend.value != "NO":
        raise ConfigError(
            "activation_checkpointing of FSDP's configuration, and torch.compile, come before sharding, but this model "
            "is sharded: use gradient_checkpointing=True, or surgery.checkpoint_activations(model); compile its blocks"
        )
    others = iter(wrapped(*(each for each in args if each is not model)))
    if model not in instance._models:
        instance._models.append(model)
    return tuple(model if each is model else next(others) for each in args)
