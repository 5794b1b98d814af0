"""`peft.adapters-of-sharded`: adapters that are added to a sharded model are whole, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import model_surgery_patches as patches
from surgery.adapters.attach import appearing_real
from surgery.comm.ranks import broadcast_from_rank0
from surgery.integrations.peft.adapters_of_meta import adapted_specimen
from surgery.model.tree import convert
from surgery.sharding.base import ShardStrategy, strategy_of

__all__ = ["replicate"]


def _given_model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["model"]


def ranks_draw_their_own() -> bool:
    """Whether two ranks whose generators differ have adapters of other initial values."""
    drawn = [adapted_specimen(device="cpu", seed=seed).model[0].lora_A["default"].weight for seed in (0, 1)]
    return not torch.equal(*drawn)


def check_averages_gradients() -> None:
    """Raise RuntimeError if an adapter that is trained keeps the gradient of one rank for itself."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    _average_gradients(layer, frozenset({"weight"}))
    layer(torch.empty(1, device="meta"))
    if not layer.weight._post_accumulate_grad_hooks:
        raise RuntimeError("expected gradients of an adapter to be averaged, found nothing that does")


@patches.register(
    "peft.adapters-of-sharded",
    target="peft.tuners.tuners_utils:BaseTuner.inject_adapter",
    reason=(
        "adapters added after sharding have the shapes of one rank's part in a mesh of two dimensions, other initial "
        "values on each rank, and gradients of that rank's batch alone: FSDP2 does not know them"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py",
    requires={"peft": ">=0.18,<0.22"},
    signature="(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None)",
    fingerprint=("5d7a11f2147b04da", "5a332736d769f1fe", "5f4330bd4fd8cd49"),  # until 0.18, until 0.20, since 0.21
    on_unknown="skip",
    on_drift="skip",
    probe=ranks_draw_their_own,
    verify=check_averages_gradients,
    subject=_given_model,
)
def replicate(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add adapters that every rank has whole, with rank 0's values; their gradients are averaged in each backward.

    To be called on all ranks alike.
    """
    model: nn.Module = _given_model(instance, args, kwargs)
    strategy = strategy_of(model)
    if strategy.label == ShardStrategy.label:
        return wrapped(*args, **kwargs)
    strategy.check_added(instance.peft_config[args[1] if len(args) > 1 else kwargs["adapter_name"]])
    strategy.settle(model)  # or PEFT would freeze parameters that are gathered, and these are shards again later
    before = set(model.parameters())
    with appearing_real(model):
        result = wrapped(*args, **kwargs)
    added = {name: parameter for name, parameter in model.named_parameters() if parameter not in before}
    convert(added.values(), device=strategy.device)
    broadcast_from_rank0(added.values(), device=strategy.device)
    _average_gradients(model, frozenset(added))
    return result


def _average_gradients(model: nn.Module, names: frozenset[str]) -> None:
    """Have the gradients of the parameters `names` averaged over all ranks in each backward.

    From the first forward on, since until then PEFT replaces parameters, to cast them.
    """

    def begin(module: nn.Module, _args: object) -> None:
        handle.remove()
        for name, parameter in module.named_parameters():
            if name in names:
                is_trained = parameter.requires_grad  # or may be later, once it is the active adapter
                parameter.requires_grad = True
                parameter.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
                parameter.requires_grad = is_trained

    handle = model.register_forward_pre_hook(begin)


def _average(parameter: torch.Tensor) -> None:
    """Average what has been accumulated, of which all but the last backward's part is the same on all ranks."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(dist.get_world_size())
