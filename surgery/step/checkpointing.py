"""Recompute the activations of decoder blocks in backward; the input of each, which is kept, may wait on the host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from surgery.errors import ConfigError
from surgery.model.tree import decoder_blocks, unwrapped
from surgery.step.offload import Offload

__all__ = ["checkpoint_activations"]

logger = logging.getLogger("surgery")


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False, offload: bool = False) -> nn.Module:
    """Wrap every decoder block of `model` in place, inside the FSDP unit around it; returns `model`.

    Non-reentrant checkpointing is what torch recommends. The reentrant kind sees gradients through its inputs
    alone, so the output of the input embeddings is made to require one. With `offload`, the first tensor that a block
    is given by position, the one large thing that a checkpointed block keeps, waits for backward in pinned memory of
    the host, copied while blocks compute; the last block's stays. Results are equal to the last bit, random numbers
    (dropout) included.

    Raises `ConfigError` for a model in which no decoder block, or no embedding that is needed, is found.
    """
    blocks = {unwrapped(site.module): None for site in decoder_blocks(model)}
    if not blocks:
        raise ConfigError(
            "activation checkpointing needs decoder blocks, but the model has no ModuleList of blocks; "
            "use activation checkpointing none"
        )
    kept, last = Offload() if offload else None, [*blocks][-1]

    def wrap(module: nn.Module) -> nn.Module:
        return checkpoint_wrapper(
            module,
            checkpoint_impl=CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT,
            checkpoint_fn=_Checkpoint(reentrant=reentrant, offload=kept, is_last=module is last),
        )

    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in blocks)
    if reentrant:
        # A reentrant checkpoint records nothing unless an input needs a gradient; embeddings give none.
        _embeddings(model).register_forward_hook(_require_grad)
    return model


class _Checkpoint:
    """Calls a block so that its activations are recomputed in backward."""

    def __init__(self, *, reentrant: bool, offload: Offload | None, is_last: bool) -> None:
        self._checkpoint = partial(checkpoint, use_reentrant=reentrant)
        self._offload, self._is_last = offload, is_last
        self._told = False
        self._draws = False  # whether the block drew random numbers when it was called last

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_last and not self._told and getattr(function, "gradient_checkpointing", False):
            self._told = True
            logger.warning(
                "surgery: blocks are recomputed twice, by checkpoint_activations and by transformers: leave out "
                "gradient_checkpointing"
            )
        # In evaluation there is no backward to recompute for, and a reentrant checkpoint would warn of that.
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        first = next((each for each in args if isinstance(each, torch.Tensor)), None)
        if first is None:
            return self._checkpoint(function, *args, **kwargs)
        saving = nullcontext() if self._offload is None else self._offload.saving(first, stays=self._is_last)
        with saving:
            return self._recorded(function, first, *args, **kwargs)

    def _recorded(self, function: Callable[..., Any], first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Torch's own care for random numbers reads and sets states for every block, whether it draws any or not."""
        generators = _generators(first)
        if generators is None:
            return self._checkpoint(function, *args, **kwargs)
        # While a CUDA graph is recorded states cannot be read, and torch refuses to where they are needed.
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._checkpoint(function, *args, preserve_rng_state=self._draws, **kwargs)
        drawn = _Drawn(function, generators)
        found = self._checkpoint(drawn, *args, preserve_rng_state=False, **kwargs)
        self._draws = bool(drawn.states)
        return found


def _generators(first: torch.Tensor) -> list[torch.Generator] | None:
    """The generators that a block draws from which is given `first`; None where that is not known."""
    if torch.compiler.is_compiling() or first.device.type not in ("cpu", "meta", "cuda"):
        return None
    of_device = [torch.cuda.default_generators[first.device.index]] if first.is_cuda else []
    return [torch.default_generator, *of_device]


class _Drawn:
    """`function`, which draws in later calls what it drew in the first, if it drew random numbers then.

    states: of the generators before the first call, in their order; none where that left them as they were.
    """

    def __init__(self, function: Callable[..., Any], generators: list[torch.Generator]) -> None:
        self._function, self._generators = function, generators
        self.states: list[torch.Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.states is None:
            before = self._read()
            found = self._function(*args, **kwargs)
            drew = any(not torch.equal(one, other) for one, other in zip(before, self._read(), strict=True))
            self.states = before if drew else []
            return found
        if not self.states:
            return self._function(*args, **kwargs)
        now = self._read()
        self._set(self.states)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._set(now)

    def _read(self) -> list[torch.Tensor]:
        return [each.get_state() for each in self._generators]

    def _set(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


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
