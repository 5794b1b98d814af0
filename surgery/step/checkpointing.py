"""Recompute the activations of decoder blocks in backward; the input of each, which is kept, may wait on the host."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from surgery.errors import ConfigError
from surgery.model.tree import decoder_blocks, unwrapped
from surgery.step.offload import Offload

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False, offload: bool = False) -> nn.Module:
    """Wrap every decoder block of `model` in place, inside the FSDP unit around it; returns `model`.

    Non-reentrant checkpointing is what torch recommends. The reentrant kind sees gradients through its inputs
    alone, so the output of the input embeddings is made to require one. With `offload`, the first tensor that a block
    is given by position, the one large thing that a checkpointed block keeps, waits for backward in pinned memory of
    the host, copied while blocks compute; the last block's stays. Results are equal to the last bit, random numbers
    (dropout) included. A second call changes the options; with the same ones it changes nothing.

    Raises `ConfigError` for a model in which no decoder block, or no embedding that is needed, is found, and for one
    whose blocks others recompute, if that or this is reentrant: they would be computed three times. That is also what
    its next step raises if transformers' checkpointing is switched on after this. Two checkpoints that are not
    reentrant recompute a block once.
    """
    blocks = {unwrapped(site.module): None for site in decoder_blocks(model)}
    if not blocks:
        raise ConfigError(
            "activation checkpointing needs decoder blocks, but the model has no ModuleList of blocks; "
            "use activation checkpointing none"
        )
    if any(_is_reentrant(module, here=reentrant) for module in model.modules()):
        raise ConfigError(f"blocks are recomputed by transformers already, {BOTH}")
    wrapped = _wrapped(model, blocks, reentrant=reentrant)
    if len(wrapped) == len(blocks) and all(made.options == (reentrant, offload) for _, made in wrapped.values()):
        return model
    # A reentrant checkpoint records nothing unless an input needs a gradient; embeddings give none.
    embeddings = _embeddings(model) if reentrant else None
    kept, last = Offload() if offload else None, [*blocks][-1]
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT

    def made(block: nn.Module) -> _Checkpoint:
        return _Checkpoint(block, reentrant=reentrant, offload=kept, is_last=block is last)

    def wrap(module: nn.Module) -> nn.Module:
        return checkpoint_wrapper(module, checkpoint_impl=implementation, checkpoint_fn=made(module))

    for block, (wrapper, _) in wrapped.items():
        wrapper.checkpoint_impl, wrapper.checkpoint_fn = implementation, partial(made(block))  # as torch does
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in blocks and module not in wrapped
    )
    _drop_hooks(model)
    if embeddings is not None:
        embeddings.register_forward_hook(_require_grad)
    return model


def _wrapped(
    model: nn.Module, blocks: Container[nn.Module], *, reentrant: bool
) -> dict[nn.Module, tuple[CheckpointWrapper, _Checkpoint]]:
    """Those of `blocks` that are wrapped here already, in what; refuses wrappers of others, if one is `reentrant`."""
    found: dict[nn.Module, tuple[CheckpointWrapper, _Checkpoint]] = {}
    for wrapper in model.modules():
        block = unwrapped(wrapper)
        if not isinstance(wrapper, CheckpointWrapper) or block not in blocks:
            continue
        made = getattr(wrapper.checkpoint_fn, "func", None)
        if isinstance(made, _Checkpoint):
            found[block] = wrapper, made
        elif reentrant or wrapper.checkpoint_impl is CheckpointImpl.REENTRANT:
            raise ConfigError(
                f"{type(block).__name__} is wrapped by torch's checkpoint_wrapper already, and would be computed three "
                "times: leave out one of the two, or have neither be reentrant"
            )
    return found


#: What to do about a block that this project and transformers have recomputed.
BOTH = (
    "and would be computed three times: call model.gradient_checkpointing_disable(), and give trainers "
    "gradient_checkpointing=False, or leave out checkpoint_activations, or have neither be reentrant"
)


def _is_reentrant(module: nn.Module, *, here: bool) -> bool:
    """Whether transformers has `module` recomputed, and its checkpoint or ours, `here`, is reentrant."""
    if getattr(module, "gradient_checkpointing", False) is not True:
        return False
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {"use_reentrant": False})
    return here or options.get("use_reentrant", True)


def _drop_hooks(model: nn.Module) -> None:
    """Forget what an earlier call has hung on embeddings."""
    for module in model.modules():
        for key, hook in [*module._forward_hooks.items()]:
            if hook is _require_grad:
                del module._forward_hooks[key]


class _Checkpoint:
    """Calls a block so that its activations are recomputed in backward. options: `(reentrant, offload)`."""

    def __init__(self, block: nn.Module, *, reentrant: bool, offload: Offload | None, is_last: bool) -> None:
        self.options = reentrant, offload is not None
        self._block = block
        self._checkpoint = partial(checkpoint, use_reentrant=reentrant)
        self._offload, self._is_last = offload, is_last
        self._draws = False  # whether the block drew random numbers when it was called last

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # In evaluation there is no backward to recompute for, and a reentrant checkpoint would warn of that.
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if self._block.training and _is_reentrant(self._block, here=self.options[0]):
            raise ConfigError(f"{type(self._block).__name__} is recomputed by transformers too, {BOTH}")
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
