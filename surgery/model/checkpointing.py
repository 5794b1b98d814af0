"""Recompute the activations of decoder blocks in backward; what is still kept may wait on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint

from surgery.errors import ConfigError
from surgery.model.fqn import WRAPPER_SEGMENTS
from surgery.model.tree import decoder_blocks

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False, offload: bool = False) -> nn.Module:
    """Wrap every decoder block of `model` in place, inside the FSDP unit around it; returns `model`.

    Non-reentrant checkpointing is what torch recommends. The reentrant kind sees gradients through its inputs
    alone, so the output of the input embeddings is made to require one. With `offload`, a block's input, the one
    thing that a checkpointed block keeps, waits on the CPU for backward.

    Raises `ConfigError` for a model in which no decoder block, or no embedding that is needed, is found.
    """
    blocks = {_unwrapped(site.module) for site in decoder_blocks(model)}
    if not blocks:
        raise ConfigError(
            "activation checkpointing needs decoder blocks, but the model has no ModuleList of blocks; "
            "use activation checkpointing none"
        )
    wrap = partial(_wrap, reentrant=reentrant, offload=offload)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in blocks)
    if reentrant:
        # A reentrant checkpoint records nothing unless an input needs a gradient; embeddings give none.
        _embeddings(model).register_forward_hook(_require_grad)
    return model


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = next((module._modules[name] for name in WRAPPER_SEGMENTS if name in module._modules), None)
    return module if inner is None else inner


def _wrap(module: nn.Module, *, reentrant: bool, offload: bool) -> nn.Module:
    wrapped = checkpoint_wrapper(
        module,
        checkpoint_impl=CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT,
        checkpoint_fn=partial(_checkpoint, use_reentrant=reentrant),
    )
    return offload_wrapper(wrapped) if offload else wrapped


def _checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool, **kwargs: Any) -> Any:
    # In evaluation there is no backward to recompute for, and a reentrant checkpoint would warn of that.
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)


def _embeddings(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_input_embeddings", None)
    found = find() if find is not None else None
    embeddings = found or next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embeddings is None:
        raise ConfigError("reentrant activation checkpointing needs an embedding layer; use non-reentrant")
    return embeddings


def _require_grad(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
    # `detach` first: under FSDP the output may be a view made in no-grad mode, which can need no gradient.
    return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_()
