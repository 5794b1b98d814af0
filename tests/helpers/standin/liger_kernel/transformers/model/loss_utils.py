from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_kernel import CALLS


class _Fused(torch.autograd.Function):
    """Chunk by chunk, gradients in forward, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, total: float) -> Any:
        assert type(weight) in (torch.Tensor, nn.Parameter), "all of it"
        loss, into_hidden, into_weight = hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
        for rows in torch.arange(len(hidden)).split(8):
            logits = (hidden[rows] @ weight.T).float()
            kept = labels[rows] != -100
            loss += nn.functional.cross_entropy(logits, labels[rows], reduction="sum") / total
            gradient = logits.softmax(-1)
            gradient[kept, labels[rows][kept]] -= 1
            gradient = (gradient * kept[:, None] / total).to(hidden.dtype)
            into_hidden[rows] = gradient @ weight
            into_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(into_hidden, into_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        into_hidden, into_weight = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        return into_hidden * gradients[0], into_weight * gradients[0] if wants_weight else None, None, None


def LigerForCausalLMLoss(  # noqa: PLR0917  # as Liger's
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    hidden_size: int,
    num_items_in_batch: int | None = None,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> Any:
    CALLS["loss"] += 1
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    target = shift_labels.reshape(-1)
    total = float((target != -100).sum()) if num_items_in_batch is None else float(num_items_in_batch)
    return _Fused.apply(hidden_states.reshape(-1, hidden_size), lm_head_weight, target, total)
