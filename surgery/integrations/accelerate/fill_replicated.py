"""`accelerate.fill-replicated`: a bound model is filled whole for DDP and one process, and on rank 0 for FSDP1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in, fill
from surgery.config import FSDP1
from surgery.errors import ConfigError

__all__ = ["fill_replicated"]

ID = "accelerate.fill-replicated"

#: What is read of accelerate's plugin.
PLUGIN = (
    "sharding_strategy", "reshard_after_forward", "ignored_modules", "use_orig_params", "mixed_precision_policy",
    "cpu_offload", "forward_prefetch", "limit_all_gathers",
)  # fmt: skip


def meta_is_not_prepared() -> bool:
    """Whether accelerate fails to prepare a model that is on meta."""
    from types import SimpleNamespace

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    single: Any = SimpleNamespace(
        device_placement=True,
        distributed_type=DistributedType.NO,
        native_amp=False,
        fp8_backend=None,
        device=torch.device("cpu"),
        verify_device_map=lambda _model: False,
        _models=[],
    )
    try:
        Accelerator.prepare_model(single, nn.Linear(1, 1, device="meta"))
    except NotImplementedError:  # of torch, for a copy from meta
        return True
    return False


def check_asks_for_strategy() -> None:
    """Raise RuntimeError if the options of accelerate's plugin are not those that are made of them."""
    from types import SimpleNamespace

    plugin: Any = defaultdict(lambda: None, reshard_after_forward=SimpleNamespace(name="SHARD_GRAD_OP"))
    made = _sharding(SimpleNamespace(**{name: plugin[name] for name in PLUGIN}))
    if made.strategy != "shard-grad-op" or made.use_orig_params:
        raise RuntimeError(f"expected shard-grad-op with flat parameters, found {made}")


@patches.register(
    ID,
    target="accelerate.accelerator:Accelerator.prepare_model",
    reason="a model that was bound while it was loaded has no weights until it is known how ranks share it",
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, model, device_placement=None, evaluation_mode=False)",
    fingerprint="a0bc5fe288a0a428",
    on_unknown="skip",
    on_drift="skip",
    probe=meta_is_not_prepared,
    verify=check_asks_for_strategy,
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
