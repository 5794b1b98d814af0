"""Activation checkpointing of the decoder blocks, before or after sharding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from surgery.errors import ConfigError
from surgery.walk import decoder_blocks

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False) -> nn.Module:
    """Recompute every decoder block of `model` in backward instead of keeping its activations; changes it in place.

    Non-reentrant checkpointing is torch's recommendation. The reentrant kind sees gradients only through its inputs,
    so the output of the input embeddings is made to require one, as PEFT does. Raises `ConfigError` if `model` has no
    repeated blocks.
    """
    blocks = {_innermost(site.module) for site in decoder_blocks(model)}
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks (a ModuleList) to checkpoint")
    if reentrant:
        _embeddings(model).register_forward_hook(_require_grad)
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: module in blocks,
    )
    return model


def _innermost(module: nn.Module) -> nn.Module:
    """The block itself, inside of what FSDP put around it: recomputing must not gather the parameters again."""
    return getattr(module, "_fsdp_wrapped_module", module)


def _embeddings(model: nn.Module) -> nn.Module:
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "get_input_embeddings")]
    if not owners:
        raise ConfigError(f"{type(model).__name__} has no get_input_embeddings: use non-reentrant checkpointing")
    embeddings: nn.Module = owners[0].get_input_embeddings()
    return embeddings


def _require_grad(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_()
