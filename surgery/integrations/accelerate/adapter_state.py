"""`accelerate.adapter-state`: of a sharded model with adapters, accelerate gathers what PEFT saves and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import model_surgery_patches as patches
from surgery.adapters.save import find_peft_model
from surgery.comm.failures import everyone, together
from surgery.comm.ranks import current_ranks
from surgery.errors import ConfigError
from surgery.model.fqn import clean, split
from surgery.model.tree import own_tensors
from surgery.model.twin import twin_of
from surgery.passes.lifetime import ours_in
from surgery.sharding.base import strategy_of

__all__ = ["gather_what_is_saved"]


def _model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return model


@patches.register(
    "accelerate.adapter-state",
    target="accelerate.accelerator:Accelerator.get_state_dict",
    reason="to save an adapter, accelerate gathers the whole base model into the memory of rank 0",
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, model, unwrap=True)",
    subject=lambda instance, args, kwargs: ours_in(_model(instance, args, kwargs)),
    on_unknown="skip",
    on_drift="skip",
)
def gather_what_is_saved(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what `PeftModel.save_pretrained(state_dict=...)` looks for: whole, on rank 0's CPU; empty on the others.

    Of all adapters, active or not. A model without adapters, or that is not sharded, has all of its own.
    """
    from accelerate.utils import DistributedType

    model = _model(instance, args, kwargs)
    if instance.distributed_type != DistributedType.FSDP:
        return wrapped(*args, **kwargs)
    try:
        prefix, adapted = find_peft_model(model)
    except ConfigError:
        return wrapped(*args, **kwargs)
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        return wrapped(*args, **kwargs)
    return _gather(model, adapted, f"{prefix}." if prefix else "")


@together()
def _gather(model: nn.Module, adapted: Any, prefix: str) -> dict[str, torch.Tensor]:
    ranks = current_ranks()
    device = next(parameter.device for parameter in model.parameters())
    names: list[Any] = [None]
    with everyone(ranks, device=device):
        if ranks.rank == 0:  # PEFT may ask the hub, which may not answer every rank alike
            names = [_saved_by_peft(adapted)]
    dist.broadcast_object_list(names, src=0)
    state = strategy_of(model).trainable_state(model, {prefix + name for name in names[0]})
    buffers = {prefix + clean(name): buffer.detach().cpu() for name, buffer in adapted.named_buffers()}
    found = {**buffers, **state} if ranks.rank == 0 else {}
    return {name: found[prefix + name] for name in names[0] if prefix + name in found}


def _saved_by_peft(model: Any) -> list[str]:
    """The names in `model` of what PEFT saves of its adapters, without wrappers.

    PEFT is asked about a copy of the tree on meta: in its own, names of wrappers would stand in its way.
    """
    from peft import get_peft_model_state_dict

    named = {
        clean(f"{prefix}.{name}" if prefix else name): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(module)
    }
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        parent, leaf = split(name)
        held.setdefault(parent, {})[leaf] = tensor
    bare = twin_of(model, lambda fqn, _: held.get(fqn, {}))[model]
    taken = {
        id(tensor)
        for adapter in model.peft_config
        for tensor in get_peft_model_state_dict(bare, state_dict=dict(named), adapter_name=adapter).values()
    }
    return [name for name, tensor in named.items() if id(tensor) in taken]
