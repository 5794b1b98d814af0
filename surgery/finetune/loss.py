"""The loss, and how it is scaled so that ranks and micro-batches add up to one mean over tokens."""

from __future__ import annotations

import torch
from torch.nn import functional

from surgery.finetune.batches import IGNORED

__all__ = ["gradient_scale", "token_loss"]


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy over the tokens that count, a float32 scalar; 0, with zero gradients, if none.

    `logits` is `(batch, length, vocabulary)` in any floating dtype, `targets` is `(batch, length)` int64,
    already shifted (`targets[i, t]` is what position `t` predicts), `IGNORED` where nothing is learnt.
    """
    # float32 before the softmax: over a vocabulary of 100,000 a bfloat16 sum has lost its small terms.
    # autocast would do the same for cross_entropy, but not for a model that computes in bfloat16 without it.
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradient_scale(*, targets: int, averaged_over: int) -> float:
    """What to multiply a rank's summed loss by, so that gradients are those of the mean over the batch.

    `targets` is the number of tokens that count in the whole global batch; `averaged_over` is the number of
    ranks over which gradients are averaged (not summed) when they are exchanged, 1 where they are not.
    """
    return averaged_over / targets
