"""A typical training loop: the model's own loss, backward, clip, step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loading.case import LEARNING_RATE, MAX_NORM

__all__ = ["adamw", "plain_step"]


def adamw(model: nn.Module, *, lr: float = LEARNING_RATE, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW over the adapters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=fused)


def plain_step(
    model: nn.Module,
    optimizer: Any,
    ids: torch.Tensor,
    *,
    clip: Callable[[float], object],
    backward: Callable[[torch.Tensor], object] = torch.autograd.backward,
) -> Callable[[], float]:
    """Make a function that takes one step on `ids` and returns this rank's loss before the step."""

    def step() -> float:
        model.train()
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        backward(loss)
        clip(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
