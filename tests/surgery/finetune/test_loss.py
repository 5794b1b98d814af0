"""The loss, against the definition written out."""

from __future__ import annotations

import torch

from surgery.finetune.batches import IGNORED
from surgery.finetune.loop import gradient_scale, token_loss


def test_sum_over_the_tokens_that_count() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7)
    targets = torch.tensor([[4, IGNORED, 0], [IGNORED, 6, IGNORED]])
    probabilities = torch.log_softmax(logits.double(), dim=-1)
    expected = -(probabilities[0, 0, 4] + probabilities[0, 2, 0] + probabilities[1, 1, 6])
    torch.testing.assert_close(token_loss(logits, targets).double(), expected, rtol=1e-6, atol=0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 50_000, dtype=torch.bfloat16)
    targets = torch.arange(4).unsqueeze(0)
    loss = token_loss(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_loss(logits.float(), targets), rtol=0, atol=0)


def test_nothing_to_learn_is_zero_with_zero_gradients() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss = token_loss(logits, torch.full((1, 2), IGNORED))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_scaled_ranks_average_to_the_mean_over_tokens() -> None:
    """Three ranks with 5, 1 and 0 tokens: the mean of their scaled sums is the sum over six tokens, divided by six."""
    sums = [5.0, 7.0, 0.0]
    scale = gradient_scale(targets=6, averaged_over=3)
    assert sum(value * scale for value in sums) / 3 == 2.0
