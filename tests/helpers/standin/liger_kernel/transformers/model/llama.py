from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss


def lce_forward(
    self: Any,
    input_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    assert self.training, "logits are wanted"
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    loss = lce_maybe_trainable_lm_head(self, hidden, self.config.hidden_size, labels, shift_labels, **kwargs)
    return CausalLMOutputWithPast(loss=loss, logits=None)


def lce_maybe_trainable_lm_head(
    self: Any, hidden_states: torch.Tensor, hidden_size: int, labels: Any, shift_labels: Any, **kwargs: Any
) -> Any:
    return LigerForCausalLMLoss(
        hidden_states=hidden_states,
        lm_head_weight=self.lm_head.weight,
        labels=labels,
        hidden_size=hidden_size,
        shift_labels=shift_labels,
        **kwargs,
    )
