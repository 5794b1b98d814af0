"""`accelerate.fill-sharded`: FSDP2 of accelerate shards a bound model on meta, and fills each rank's shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in, fill
from surgery.config import FSDP2
from surgery.errors import ConfigError

__all__ = ["fill_sharded"]

ID = "accelerate.fill-sharded"


def packed_weights_are_whole() -> bool:
    """Whether accelerate leaves out the path over meta for a model with 4-bit weights, by its source."""
    import inspect

    from accelerate.utils import fsdp_utils

    return "cpu_ram_efficient_loading and not model_has_params4bit" in inspect.getsource(fsdp_utils.fsdp2_prepare_model)


def check_asks_for_policy() -> None:
    """Raise RuntimeError if the options of accelerate's plugin are not those that are made of them."""
    from types import SimpleNamespace

    plugin = SimpleNamespace(cpu_offload=None, reshard_after_forward=False, mixed_precision_policy=None)
    made = _sharding(plugin, None, groups=())
    if made.reshard_after_forward is not False or made.mesh is not None:
        raise RuntimeError(f"expected options without resharding and mesh, found {made}")


@patches.register(
    ID,
    target="accelerate.accelerator:fsdp2_prepare_model",
    reason="accelerate skips the path over meta for 4-bit weights, so that every rank has all of them until it shards",
    upstream="https://github.com/huggingface/accelerate/issues/3874",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(accelerator, model)",
    fingerprint="c3ff53b749f04ce7",
    on_unknown="skip",
    on_drift="skip",
    subject=lambda _instance, args, kwargs: args[1] if len(args) > 1 else kwargs["model"],
    probe=packed_weights_are_whole,
    verify=check_asks_for_policy,
)
def fill_sharded(
    wrapped: Callable[..., nn.Module], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    """Fill a bound model as the plugin says: its mesh, offload, mixed precision, and the modules that it wraps."""
    accelerator, model = (*args, *kwargs.values())
    if bound_in(model) is None:
        patches.passed(ID)
        return wrapped(*args, **kwargs)
    import torch

    plugin = accelerator.state.fsdp_plugin
    if plugin.ignored_modules is not None:
        raise ConfigError(
            "fsdp_ignored_modules leaves modules whole on every rank, which is not done for a model of "
            "surgery.low_memory(): leave it out, or load the model outside of the block"
        )
    if accelerator.mixed_precision != "no" and not getattr(model, "is_quantized", False):
        for parameter in model.parameters():  # as accelerate does: master weights in float32
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)
    plugin.set_auto_wrap_policy(model)
    options = _sharding(plugin, _mesh_shape(accelerator), groups=_wrapped(plugin, model))
    return fill(model, shard=options, device=accelerator.device)


def _sharding(plugin: Any, mesh: tuple[int, int] | None, *, groups: tuple[str, ...] | None) -> FSDP2:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return FSDP2(
        mesh=mesh,
        reshard_after_forward=plugin.reshard_after_forward,
        mixed_precision=plugin.mixed_precision_policy,
        cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        groups=groups,
        casts_kept=True,
    )


def _mesh_shape(accelerator: Any) -> tuple[int, int] | None:
    """`(replicate, shard)` as `ParallelismConfig` says; None where all ranks shard."""
    config = accelerator.parallelism_config
    if config is None:
        return None
    if config.non_data_parallel_size != 1:
        raise ConfigError(
            f"expected data parallelism alone, found tp_size={config.tp_size}, cp_size={config.cp_size}, "
            f"sp_size={config.sp_size}: load the model outside of surgery.low_memory()"
        )
    return (config.dp_replicate_size, config.dp_shard_size) if config.dp_replicate_enabled else None


def _wrapped(plugin: Any, model: nn.Module) -> tuple[str, ...] | None:
    """FQNs of the modules that are groups of their own by the plugin's policy, inner ones first."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    if policy is None:
        return ()
    names = {module: name for name, module in model.named_modules() if name and policy(module)}
    return tuple(sorted(names.values(), key=lambda name: -name.count(".")))
