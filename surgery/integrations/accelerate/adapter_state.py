"""`accelerate.adapter-state`: of a sharded model with adapters, accelerate gathers what PEFT saves and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from surgery.model.twin import twin_of
from surgery.sharding.base import strategy_of

__all__ = ["gather_what_is_saved"]


def _model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = args[0] if args else kwargs["model"]
    return model


def everything_is_gathered() -> bool:
    """Whether accelerate gathers frozen parameters too, by its source."""
    import inspect

    from accelerate import Accelerator

    return "ignore_frozen_params" not in inspect.getsource(Accelerator.get_state_dict)


def check_saves_adapters() -> None:
    """Raise RuntimeError if something else than adapters would be gathered of a model that has some."""
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=1, target_modules=["0"]))
    found = set(_saved_by_peft(model, {name for name, _ in model.named_parameters()}))
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if found != adapters:
        raise RuntimeError(f"expected {sorted(adapters)} to be gathered, found {sorted(found)}")


@patches.register(
    "accelerate.adapter-state",
    target="accelerate.accelerator:Accelerator.get_state_dict",
    reason="to save an adapter, accelerate gathers the whole base model into the memory of rank 0",
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, model, unwrap=True)",
    fingerprint="5bb2feee832994b3",
    subject=_model,
    on_unknown="skip",
    on_drift="skip",
    probe=everything_is_gathered,
    verify=check_saves_adapters,
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
    ranks, strategy = current_ranks(), strategy_of(model)
    device = next(parameter.device for parameter in model.parameters())
    saved: list[Any] = [None]
    with everyone(ranks, device=device):
        buffers = {clean(name): buffer.detach() for name, buffer in model.named_buffers()}
        if ranks.rank == 0:  # PEFT may ask the hub, which may not answer every rank alike
            names = strategy.parameter_names(model) | buffers.keys()
            inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            saved = [{prefix + name for name in _saved_by_peft(adapted, inside)}]
    dist.broadcast_object_list(saved, src=0)
    state = strategy.trainable_state(model, frozenset(saved[0]))
    if ranks.rank != 0:
        return {}
    found = {**{name: buffer.cpu() for name, buffer in buffers.items() if name in saved[0]}, **state}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name in saved[0]}


def _saved_by_peft(model: Any, names: set[str]) -> Iterator[str]:
    """Those of `names`, of parameters and buffers of `model` without wrappers, that PEFT saves of any adapter.

    PEFT is asked about a copy of the tree on meta: in `model` itself, names of wrappers would stand in its way.
    """
    from peft import get_peft_model_state_dict

    state = {name: torch.empty(0, device="meta") for name in names}
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        parent, leaf = split(name)
        held.setdefault(parent, {})[leaf] = tensor
    bare = twin_of(model, lambda fqn, module: {k: v for k, v in held.get(fqn, {}).items() if k not in module._buffers})
    taken: set[int] = set()
    for adapter in model.peft_config:
        taken |= {id(t) for t in get_peft_model_state_dict(bare[model], dict(state), adapter_name=adapter).values()}
    return (name for name, tensor in state.items() if id(tensor) in taken)
