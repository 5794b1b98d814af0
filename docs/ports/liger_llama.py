"""Liger-Kernel's set for Llama as declarations. See `liger_llama.md`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import reference
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import patches

LLAMA = "transformers.models.llama.modeling_llama"
COMMON: dict[str, Any] = {
    "upstream": "https://github.com/linkedin/Liger-Kernel",
    "requires": {"transformers": ">=5.24,<5.40"},
}
NEEDS_LOGITS = {"shift_labels", "logits_to_keep", "return_dict"}


class _Caller(threading.local):
    """The attention module that runs in this thread. A `ContextVar` would split the graph of torch.compile."""

    module: nn.Module | None = None


_caller = _Caller()


@patches.register(
    "liger.llama-attention",
    target=f"{LLAMA}:LlamaAttention.forward",
    reason="apply_rotary_pos_emb is not told which module calls it",
    **COMMON,
)
def remember_attention(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Remember the module for the `subject` of the rotary function."""
    _caller.module = instance
    try:
        return wrapped(*args, **kwargs)
    finally:
        _caller.module = None


patches.register(
    "liger.llama-rotary",
    target=f"{LLAMA}:apply_rotary_pos_emb",
    replace=reference.apply_rotary_pos_emb,
    reason="the stock one makes a copy of queries and keys to rotate them",
    subject=lambda _instance, _args, _kwargs: _caller.module,
    needs=("liger.llama-attention",),
    **COMMON,
)


def rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Normalize by the fused kernel."""
    return reference.rms_norm(hidden_states, self.weight, self.variance_epsilon)


patches.register(
    "liger.llama-rms-norm",
    target=f"{LLAMA}:LlamaRMSNorm.forward",
    replace=rms_norm,
    reason="the stock one is five kernels, and keeps a copy in float32",
    **COMMON,
)


@patches.register(
    "liger.llama-swiglu",
    target=f"{LLAMA}:LlamaMLP.forward",
    reason="the stock one keeps silu(gate) for the backward",
    signature="(self, x)",
    **COMMON,
)
def swiglu(
    wrapped: Callable[..., torch.Tensor], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Gate by the fused kernel; an activation that it does not have takes the stock way."""
    if instance.config.hidden_act not in ("silu", "swish"):
        return wrapped(*args, **kwargs)
    (x,) = args
    return instance.down_proj(reference.silu_mul(instance.gate_proj(x), instance.up_proj(x)))


@patches.register(
    "liger.llama-loss",
    target=f"{LLAMA}:LlamaForCausalLM.forward",
    reason="the stock one materializes the logits of all tokens to compute a loss",
    signature="(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, "
    "labels=None, use_cache=None, logits_to_keep=0, **kwargs)",
    **COMMON,
)
def fused_loss(
    wrapped: Callable[..., Any], instance: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Compute the loss chunk by chunk in training; what asks for logits takes the stock way."""
    if not instance.training or kwargs.get("labels") is None or NEEDS_LOGITS & kwargs.keys():
        return wrapped(*args, **kwargs)
    labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
    outputs = instance.model(*args, **kwargs)
    loss = reference.linear_cross_entropy(outputs.last_hidden_state, instance.lm_head.weight, labels, items)
    return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


patches.register(
    "liger.cross-entropy",
    target="transformers.loss.loss_utils:fixed_cross_entropy",
    replace=reference.cross_entropy,
    reason="the stock one keeps the softmax of all logits for the backward",
    conflicts=("liger.llama-loss",),
    **COMMON,
)

patches.bundle(
    "liger-llama",
    ("liger.llama-attention", "liger.llama-rotary", "liger.llama-rms-norm", "liger.llama-swiglu", "liger.llama-loss"),
    atomic=True,
)


def on_model(model: nn.Module) -> patches.Transaction:
    """Open the whole set for one model; other models never notice."""
    return patches.transaction("liger-llama", on=list(model.modules()), reason="one model")
