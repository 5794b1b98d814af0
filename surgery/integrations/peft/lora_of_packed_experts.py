"""`peft.lora-of-packed-experts`: adapters of experts in 4 bits have the shapes of their values, and never merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.quantizers.stack import PackedStack, stacks_of

__all__ = ["packed_specimen", "split"]


def packed_specimen() -> nn.Module:
    """The smallest module with a packed stack, `w` of two experts; its bytes and statistics are zeros."""
    stack = PackedStack(
        experts=2, shape=(8, 8), quant_type="nf4", blocksize=64, double_quant=False, dtype=torch.bfloat16
    )
    module = nn.Module()
    vars(module)["packed_stacks"] = {"w": stack}
    for name, size in (("w", stack.packed_bytes), ("w_statistics", stack.statistics_bytes)):
        data = torch.zeros(size // 2, 1, dtype=torch.bfloat16, device="cpu")
        module.register_parameter(name, nn.Parameter(data, requires_grad=False))
    return module


def adapted(dispatch: Callable[..., Any], **options: Any) -> Any:
    """What `dispatch` of PEFT makes of the specimen, with adapters of rank 1."""
    from peft import LoraConfig

    config = LoraConfig(r=1, **options)
    with torch.random.fork_rng(devices=()):
        return dispatch(packed_specimen(), "default", config=config, parameter_name="w", r=1, lora_alpha=1)


def adapters_are_of_bytes() -> bool:
    """Whether PEFT takes the storage of a packed stack for one matrix."""
    from peft.tuners.lora.model import dispatch_default

    return bool(adapted(dispatch_default).num_experts == 1)


def check_has_experts() -> None:
    """Raise RuntimeError if an adapter has not the shapes of two experts, or no dropout."""

    def upstream(*_args: object, **_options: object) -> None:
        raise RuntimeError("expected an adapter of a packed stack, found that it is left to PEFT")

    made = adapted(lambda *args, **options: split(upstream, None, args, options), lora_dropout=0.5)
    found = tuple(made.lora_A["default"].weight.shape), tuple(made.lora_B["default"].weight.shape)
    if found != ((2, 8), (8, 2)) or not isinstance(made.lora_dropout["default"], nn.Dropout):
        raise RuntimeError(f"expected adapters (2, 8) and (8, 2) with dropout, found {made}")


def _base(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0] if args else kwargs["target"]
    return target.get_base_layer() if hasattr(target, "get_base_layer") else target


@patches.register(
    "peft.lora-of-packed-experts",
    target="peft.tuners.lora.model:dispatch_default",
    reason=(
        "PEFT's adapters of a parameter have the shape of its storage, which packed experts do not have, and add their "
        "product to the whole weight, which is never there"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py",
    requires={"peft": ">=0.19,<0.22"},
    signature="(target, adapter_name, config, parameter_name=None, **kwargs)",
    fingerprint="49ab14e3a04a2976",
    subject=_base,
    probe=adapters_are_of_bytes,
    verify=check_has_experts,
)
def split(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make PEFT's wrapper in split form for a parameter that is packed; everything else is left to PEFT."""
    from surgery.adapters.experts import ParamWrapper

    if kwargs.get("parameter_name") not in stacks_of(_base(None, args, kwargs)):
        return wrapped(*args, **kwargs)
    return ParamWrapper(*args, **kwargs)
