"""`accelerate.optimizer-of-meta`: an optimizer of parameters on meta is given each parameter's own shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.model.fqn import clean

__all__ = ["find_by_name"]


def _models(args: tuple[Any, ...]) -> Iterator[nn.Module]:
    return (each for each in args if isinstance(each, nn.Module))


def _given_model(_instance: object, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> nn.Module | None:
    return next(_models(args), None)


def shards_are_found_by_address() -> bool:
    """Whether accelerate cannot tell apart parameters on meta, of which it notes the addresses."""
    from types import SimpleNamespace

    from accelerate import Accelerator

    accelerator: Any = SimpleNamespace(fp8_backend=None)
    noted = Accelerator._get_named_parameters(accelerator, nn.Linear(1, 1, device="meta"), drop_refs=True)
    return len(set(noted.values())) < len(noted)


def check_finds_each_its_own() -> None:
    """Raise RuntimeError if an optimizer that accelerate gives one shard for all is not given each its own."""
    model, sharded = nn.Linear(1, 1, device="meta"), nn.Linear(1, 1, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def prepare(*_args: Any) -> tuple[Any, ...]:
        optimizer.param_groups[0]["params"] = [sharded.bias, sharded.bias]
        return sharded, optimizer

    find_by_name(prepare, None, (model, optimizer), {})
    given = optimizer.param_groups[0]["params"]
    if [id(each) for each in given] != [id(sharded.weight), id(sharded.bias)]:
        raise RuntimeError("expected an optimizer to get the shard of each of its parameters, found another one")


@patches.register(
    "accelerate.optimizer-of-meta",
    target="accelerate.accelerator:Accelerator._prepare_fsdp2",
    reason=(
        "accelerate finds the shard of an optimizer's parameter by its address, which is 0 for all that are on meta: "
        "silently, the optimizer trains one of them and none of the others"
    ),
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py",
    requires={"accelerate": ">=1.15,<1.16"},
    signature="(self, *args)",
    fingerprint="74da433b6d4ab0fc",
    subject=_given_model,
    on_unknown="skip",
    on_drift="skip",
    probe=shards_are_found_by_address,
    verify=check_finds_each_its_own,
)
def find_by_name(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """Give each optimizer, of each parameter that it had, what has the same name afterwards."""
    names = {parameter: clean(name) for model in _models(args) for name, parameter in model.named_parameters()}
    held = [[names.get(parameter) for parameter in group["params"]] for group in _groups(args)]
    del names  # what is sharded on the way may be freed then
    result = wrapped(*args)
    now = {clean(name): parameter for model in _models(result) for name, parameter in model.named_parameters()}
    for group, before in zip(_groups(args), held, strict=True):  # accelerate replaces the groups themselves
        mapped = group["params"]  # by accelerate, which has refused what is not of the model
        group["params"] = [found if name is None else now[name] for name, found in zip(before, mapped, strict=True)]
    return result


def _groups(args: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [group for each in args if isinstance(each, torch.optim.Optimizer) for group in each.param_groups]
