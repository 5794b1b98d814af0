"""`peft.merge-of-parametrized`: merging into parametrized parameters, which would change nothing, is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY
from ._specimen import adapted_parametrized

__all__ = ["refuse"]


def nothing_is_merged() -> bool:
    """Whether PEFT says that an adapter is merged into a parametrized parameter, and has changed nothing."""
    import torch
    from peft.tuners.lora import layer

    if not hasattr(layer, "ParamWrapper"):  # PEFT before 0.17 adapts no parameters
        return False
    tuner = adapted_parametrized()
    experts = tuner.model[0].get_base_layer()
    before = experts.a
    try:
        tuner.merge_adapter()
    except ValueError:
        return False
    return bool(tuner.model[0].merged) and torch.equal(experts.a, before)


def check_refuses() -> None:
    """Raise RuntimeError if merging is not refused."""
    try:
        refuse(lambda: None, adapted_parametrized(), (), {})
    except ValueError:
        return
    raise RuntimeError("expected merging into a parametrized parameter to be refused")


@REGISTRY.register(
    "peft.merge-of-parametrized",
    target="peft.tuners.lora.model:LoraModel._check_merge_allowed",
    reason=(
        "merge_adapter() and merge_and_unload() add to a copy where a parameter is parametrized, such as experts in 4 "
        "bits: the model computes without the adapter from then on, which is marked as merged"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py",
    requires={"peft": ">=0.18,<=0.21.2"},
    signature="(self)",
    fingerprint="157489e67e870dfe",
    probe=nothing_is_merged,
    verify=check_refuses,
    subject=lambda instance, _args, _kwargs: instance.model,
)
def refuse(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError, before anything is merged, if an adapted parameter is parametrized."""
    from peft.tuners.lora import ParamWrapper
    from torch.nn.utils.parametrize import is_parametrized

    for name, module in instance.model.named_modules():
        if isinstance(module, ParamWrapper) and is_parametrized(module.get_base_layer(), module.parameter_name):
            raise ValueError(
                f"Cannot merge into {name}.{module.parameter_name}, which is parametrized (in 4 bits, say): its values "
                "are computed whenever they are read. Save the adapter, and merge it into the 16-bit model"
            )
    wrapped(*args, **kwargs)
