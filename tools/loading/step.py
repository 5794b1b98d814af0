"""One optimizer step in a loop of one's own, on a model sharded in any way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from surgery.sharding.base import ShardStrategy

__all__ = ["IGNORED", "Micro", "take_step", "token_loss"]

#: A target that is not learnt.
IGNORED = -100

#: `(ids, targets)`, both `(batch, length)` int64; targets are shifted already.
Micro = tuple[torch.Tensor, torch.Tensor]


def token_loss(model: nn.Module, micro: Micro) -> torch.Tensor:
    """Sum of the cross entropy over the tokens that are learnt, in float32; 0, with zero gradients, if none is."""
    ids, targets = micro
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micros: Sequence[Micro],
    *,
    targets: int,
    strategy: ShardStrategy,
    scaler: torch.amp.GradScaler,
    max_norm: float | None = None,
) -> tuple[float, float]:
    """Learn from this rank's `micros` of a batch with so many `targets` on all ranks; the mean loss and the norm."""
    total = torch.zeros((), dtype=torch.float64, device=micros[0][0].device)
    for number, micro in enumerate(micros, 1):
        with strategy.micro_step(model, is_last=number == len(micros)):
            loss = token_loss(model, micro)
            torch.autograd.backward(scaler.scale(loss * (strategy.averaged_over / targets)))
        total += loss.detach()
    mean = strategy.sum(total).item() / targets
    scaler.unscale_(optimizer)
    norm = strategy.clip(model, max_norm).item()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean, norm
