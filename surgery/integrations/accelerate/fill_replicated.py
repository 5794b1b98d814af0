"""`accelerate.fill-replicated`: a bound model is filled whole for DDP and one process, and on rank 0 for FSDP1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in, fill
from surgery.config import FSDP1
from surgery.errors import ConfigError

__all__ = ["fill_replicated"]

ID = "accelerate.fill-replicated"


@patches.register(
    ID,
    target="accelerate.accelerator:Accelerator.prepare_model",
    reason="a model that was bound while it was loaded has no weights until it is known how ranks share it",
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, model, device_placement=None, evaluation_mode=False)",
    on_unknown="skip",
    on_drift="skip",
    subject=lambda _instance, args, kwargs: args[0] if args else kwargs["model"],
)
def fill_replicated(
    wrapped: Callable[..., nn.Module], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    """Fill a bound model, then prepare it as accelerate does."""
    given = dict(zip(("model", "device_placement", "evaluation_mode"), args, strict=False)) | kwargs
    if bound_in(given["model"]) is None:
        patches.passed(ID)
        return wrapped(**given)
    from accelerate.utils import DistributedType

    if instance.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"expected FSDP, DDP or one process, found {instance.distributed_type}: load the model outside of "
            "surgery.low_memory()"
        )
    if instance.is_fsdp2:  # which wants an optimizer beside the model, and says so
        return wrapped(**given)
    shard = _sharding(instance.state.fsdp_plugin) if instance.distributed_type == DistributedType.FSDP else None
    return wrapped(**given | {"model": fill(given["model"], shard=shard, device=instance.device)})


def _sharding(plugin: Any) -> FSDP1:
    """FSDP1 as the plugin says. Units are ours: every decoder block, and what its flat parameter cannot hold."""
    strategy: Any = getattr(plugin.sharding_strategy or plugin.reshard_after_forward, "name", "FULL_SHARD")
    if plugin.ignored_modules is not None or "HYBRID" in strategy:
        raise ConfigError(
            f"expected FSDP1 without ignored_modules and hybrid sharding, found {plugin.ignored_modules} and "
            f"{strategy}: use fsdp_version 2, or load the model outside of surgery.low_memory()"
        )
    return FSDP1(
        strategy=strategy.lower().replace("_", "-"),
        use_orig_params=bool(plugin.use_orig_params),
        mixed_precision=plugin.mixed_precision_policy,
        cpu_offload=bool(getattr(plugin.cpu_offload, "offload_params", plugin.cpu_offload)),
        forward_prefetch=bool(plugin.forward_prefetch),
        limit_all_gathers=bool(plugin.limit_all_gathers),
        casts_kept=True,
    )
