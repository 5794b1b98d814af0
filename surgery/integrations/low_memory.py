"""`surgery.low_memory()`: scripts for transformers, PEFT, accelerate and TRL load a share of a model on each rank."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn

import model_surgery_patches as patches
from surgery.bound import BOUND, LOADED, bound_in
from surgery.comm.comparison import same_on_every_rank
from surgery.comm.failures import collective
from surgery.comm.heartbeat import beating
from surgery.comm.ranks import current_ranks
from surgery.config import QuantType
from surgery.errors import ConfigError
from surgery.passes.lifetime import WAITING, keep
from surgery.step.kernels import chosen_kernels

__all__ = ["BUNDLE", "CARRIED", "asked_experts", "asked_kernels", "carry", "is_bound", "low_memory", "waits"]

logger = logging.getLogger("surgery")

P = ParamSpec("P")
R = TypeVar("R")

#: The blocks that this process is in, the innermost last.
_blocks: list[_Block] = []

#: Patches that a model carries from when it is bound until it is collected.
CARRIED = ("accelerate.fill-sharded", "accelerate.fill-replicated", "accelerate.optimizer-of-meta")

#: Patches that it carries once somebody imports what they are for, which takes memory.
WHEN_IMPORTED = ("transformers.fill-at-move", "trl.fill-reference")

#: Patches of a block of `low_memory`.
BUNDLE = patches.bundle(
    "low-memory", ("transformers.bind-at-load", "transformers.wait-when-loaded", *CARRIED), atomic=True
)


class _Block:
    """The block that `low_memory` returns: entered once, or called any number of times as a decorator."""

    def __init__(self, experts: QuantType | None, kernels: tuple[str, ...] | None) -> None:
        self.experts = experts
        self.kernels = kernels

    def __enter__(self) -> None:
        self._stack = ExitStack()
        try:
            patches.plan(*WAITING)  # which a model gets when it is bound, and which must not fail by then
            self._stack.enter_context(patches.transaction(BUNDLE.name, reason="surgery.low_memory()"))
        except patches.PatchError as error:
            if self.experts is not None:
                raise ConfigError(f"low_memory: experts={self.experts!r} is not to be had here: {error}") from error
            logger.warning("surgery.low_memory: everything runs as without it: %s", error)
        _blocks.append(self)
        self._stack.callback(_blocks.remove, self)

    def __exit__(self, *raised: object) -> None:
        self._stack.__exit__(*raised)  # type: ignore[arg-type]  # what `with` gives

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        for is_run_later in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            if is_run_later(function):
                raise ConfigError(
                    f"low_memory: {function.__qualname__} runs after the block around its call has ended: "
                    "write `with surgery.low_memory():` around from_pretrained in it"
                )

        @functools.wraps(function)
        def in_block(*args: P.args, **kwargs: P.kwargs) -> R:
            with low_memory(experts=self.experts, kernels=self.kernels):
                return function(*args, **kwargs)

        return in_block


def low_memory(*, experts: QuantType | None = None, kernels: str | Sequence[str] | None = None) -> _Block:
    """A block, or a decorator, in which `from_pretrained` reads nothing, and `prepare` reads what each rank will own.

    Inside, `from_pretrained(...)` of transformers builds a model as always, 4-bit layers of bitsandbytes included, and
    *binds* it to its files; every parameter stays on meta. PEFT adapts it, and `accelerate.prepare`, which the trainers
    of transformers and TRL call, *fills* it: under FSDP2 with each rank's shard; under FSDP1 on rank 0's CPU, from
    where it is broadcast; under DDP and in one process whole. A loop of your own calls `surgery.fill(model)`.

    The block is needed around `from_pretrained` alone. What cannot be loaded so is loaded as without it, and a line of
    the logger `surgery` says why; where an installed library is not one that this was written for, all of it is.

    experts: `nf4` or `fp4` has fused experts in 4 bits too, for which transformers' configuration has no word; None
    leaves them in 16 bits, or to a block around this one. Statistics and storage are those of `quantization_config`;
    experts multiply in the dtype of the model, as in 16 bits, whatever its `bnb_4bit_compute_dtype` is. Without one all
    other weights stay in 16 bits; transformers, PEFT and TRL then take the model for one in 4 bits, which is not cast,
    and is trained with adapters only. A model whose experts cannot be had so raises `ConfigError`.

    kernels: as in `surgery.qlora`, for models that are bound here, once they are filled; None leaves them to a block
    around this one, and `()` is for none. Raises `ConfigError` for what is not installed, and filling does for what
    does not run there.
    """
    if experts not in (None, "nf4", "fp4"):
        raise ConfigError(f"low_memory: experts must be 'nf4', 'fp4' or None; got {experts!r:.80}")
    return _Block(experts, None if kernels is None else chosen_kernels(kernels))


def asked_experts() -> QuantType | None:
    """The 4-bit type that the innermost block asks for fused experts; None for 16 bits."""
    return next((block.experts for block in reversed(_blocks) if block.experts is not None), None)


def asked_kernels() -> tuple[str, ...]:
    """The kernels that the innermost block which says so asks for."""
    return next((block.kernels for block in reversed(_blocks) if block.kernels is not None), ())


def waits(model: nn.Module | None) -> bool:
    """Whether `model`, or one in it, was loaded in a block, and ranks have not compared how."""
    return model is not None and any(BOUND in vars(module) or LOADED in vars(module) for module in model.modules())


def is_bound(model: nn.Module, device: torch.device) -> bool:
    """Whether `model` is bound and is to be filled; collective where it, or one in it, was loaded in a block.

    Raises `ConfigError` where some ranks have bound it and some have loaded it, which would wait for each other.
    """
    bound, loaded = bound_in(model) is not None, [module for module in model.modules() if LOADED in vars(module)]
    if (bound or loaded) and dist.is_initialized():
        ranks = current_ranks()
        facts = {"from_pretrained": "binds" if bound else "loads"}
        with beating(ranks), collective(ranks):
            same_on_every_rank(ranks, "prepare", {"surgery.low_memory()": facts}, device=device)
    for module in loaded:
        del vars(module)[LOADED]
    return bound


def carry(model: nn.Module) -> None:
    """Keep the patches by which `model` is filled in force for it, until it is released or collected."""
    scoped = [patches.on(patch, waits) for patch in CARRIED]
    why = f"{type(model).__name__} waits to be prepared"
    with patches.transaction(*scoped, reason=why) as transaction:
        keep(model, transaction.receipts)
        transaction.commit()
    keep(model, patches.defer(*WHEN_IMPORTED, reason=why).receipts)  # which pass what is not bound
