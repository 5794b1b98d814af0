"""`accelerate.no-second-wrapper`: accelerate wraps no sharded model in DDP, and no model of DDP a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.integrations.accelerate.already_sharded import sharded_specimen
from surgery.sharding.base import ShardStrategy, strategy_of

__all__ = ["wrap_once"]


def _model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return model


def sharded_is_wrapped() -> bool:
    """Whether accelerate would wrap in DDP what FSDP2 has sharded."""
    from types import SimpleNamespace

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    ranks: Any = SimpleNamespace(
        device_placement=False,
        distributed_type=DistributedType.MULTI_CPU,
        multi_device=True,
        native_amp=False,
        fp8_backend=None,
        parallelism_config=None,
        ddp_handler=None,
        device=torch.device("cpu"),
        local_process_index=0,
        verify_device_map=lambda _model: False,
        _models=[],
    )
    model = sharded_specimen()
    # DDP refuses a model on two devices before it speaks to any rank.
    model.on_cpu = nn.Parameter(torch.empty(1, device="cpu"))
    try:
        Accelerator.prepare_model(ranks, model, device_placement=False)
    except ValueError:  # of DDP, for no process group, or for two devices
        return True
    return False


def check_refuses_sharded() -> None:
    """Raise RuntimeError if what FSDP2 has sharded comes to accelerate where that is not configured for it."""
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    try:
        ranks = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, is_fsdp2=False)
        wrap_once(lambda *_args, **_kwargs: None, ranks, (sharded_specimen(),), {})
    except ConfigError:
        return
    raise RuntimeError("expected a sharded model to be refused where accelerate is configured for DDP")


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
    fingerprint="a0bc5fe288a0a428",
    subject=_model,
    on_unknown="skip",
    on_drift="skip",
    probe=sharded_is_wrapped,
    verify=check_refuses_sharded,
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
