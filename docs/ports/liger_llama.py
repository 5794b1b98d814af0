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
UPSTREAM = "https://github.com/linkedin/Liger-Kernel"
SEEN = {"transformers": ">=5.24,<5.40"}
NEEDS_LOGITS = {"shift_labels", "logits_to_keep", "return_dict"}


class _Caller(threading.local):
    """The attention module that runs in this thread. Dynamo traces a `threading.local`; a `ContextVar` splits the graph."""

    module: nn.Module | None = None


_caller = _Caller()


@patches.register(
    "liger.llama-attention",
    target=f"{LLAMA}:LlamaAttention.forward",
    reason="apply_rotary_pos_emb is a function, and is not told which model calls it",
    upstream=UPSTREAM,
    requires=SEEN,
)
def remember_attention(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Remember the module for `apply_rotary_pos_emb`."""
    _caller.module = instance
    try:
        return wrapped(*args, **kwargs)
    finally:
        _caller.module = None


@patches.register(
    "liger.llama-rotary",
    target=f"{LLAMA}:apply_rotary_pos_emb",
    reason="the stock one makes a copy of queries and keys to rotate them",
    upstream=UPSTREAM,
    requires=SEEN,
    signature="(q, k, cos, sin, unsqueeze_dim=1)",
    subject=lambda instance, args, kwargs: _caller.module,
    needs=("liger.llama-attention",),
)
def rotary(
    wrapped: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate by the fused kernel."""
    return reference.rotate(*args, **kwargs)


@patches.register(
    "liger.llama-rms-norm",
    target=f"{LLAMA}:LlamaRMSNorm.forward",
    reason="the stock one is five kernels, and keeps a copy in float32",
    upstream=UPSTREAM,
    requires=SEEN,
    signature="(self, hidden_states)",
)
def rms_norm(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Normalize by the fused kernel."""
    return reference.rms_norm(*args, instance.weight, instance.variance_epsilon)


@patches.register(
    "liger.llama-swiglu",
    target=f"{LLAMA}:LlamaMLP.forward",
    reason="the stock one keeps silu(gate) for the backward",
    upstream=UPSTREAM,
    requires=SEEN,
    signature="(self, x)",
)
def swiglu(
    wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
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
    upstream=UPSTREAM,
    requires=SEEN,
    signature="(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, "
    "labels=None, use_cache=None, logits_to_keep=0, **kwargs)",
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


@patches.register(
    "liger.cross-entropy",
    target="transformers.loss.loss_utils:fixed_cross_entropy",
    reason="the stock one keeps the softmax of all logits for the backward",
    upstream=UPSTREAM,
    requires=SEEN,
    signature="(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs)",
    conflicts=("liger.llama-loss",),
)
def cross_entropy(
    wrapped: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute the loss by the fused kernel."""
    return reference.cross_entropy(*args, **kwargs)


patches.bundle(
    "liger-llama",
    ("liger.llama-attention", "liger.llama-rotary", "liger.llama-rms-norm", "liger.llama-swiglu", "liger.llama-loss"),
)


def on_model(model: nn.Module) -> patches.Transaction:
    """Open the whole set for one model; other models never notice."""
    return patches.transaction("liger-llama", on=list(model.modules()), reason="one model")
