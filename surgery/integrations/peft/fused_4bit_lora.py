"""`peft.fused-4bit-lora`: a 4-bit layer and its LoRA adapter compute as one autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import model_surgery_patches as patches
from surgery.step.fuse import PATCH, forward

__all__ = ["compute_fused"]


@patches.register(
    PATCH,
    target="peft.tuners.lora.bnb:Linear4bit.forward",
    reason="a 4-bit layer with its adapter is some ten autograd nodes and a dozen kernels, each launched from Python",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/bnb.py",
    requires={"peft": ">=0.17,<0.22", "bitsandbytes": ">=0.47,<0.51"},
)
def compute_fused(
    wrapped: Callable[..., torch.Tensor], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute by the fused function where it is for this call, else as PEFT does."""
    found = forward(instance, args[0]) if len(args) == 1 and not kwargs else None
    return wrapped(*args, **kwargs) if found is None else found
