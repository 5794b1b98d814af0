"""Compile the decoder blocks of a model: one graph serves all blocks that are alike."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Final, cast

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import Cache

from surgery.errors import ConfigError
from surgery.model.fqn import WRAPPER_SEGMENTS
from surgery.model.tree import decoder_blocks, unwrapped
from surgery.passes.lifetime import Extension, at_release, postponed
from surgery.quantizers.base import packed_names, quantized_modules

__all__ = ["compile_blocks"]

_serials: Final = itertools.count(1)


def compile_blocks(model: nn.Module, *, fullgraph: bool = True, **options: Any) -> nn.Module:
    """Have the `forward` of every decoder block of `model` compiled when it is first called; returns `model`.

    Blocks of one class whose parameters have the same names and shapes share their graphs: one for the first block,
    whose input may need no gradient, and one for the others; as many again once the number of tokens has changed.
    Hooks of a block, such as FSDP2's, and checkpoints around it stay outside. A call with a cache of keys and values,
    as in generation, is not compiled. Undone by `surgery.release(model)`; a copy or a pickle of the model has blocks
    that are not compiled. A bound model, as that of a trainer under `surgery.low_memory` is until it trains, is
    compiled once it is filled.

    fullgraph, options: as `torch.compile` takes them. With `fullgraph`, a block that is more than one graph raises.

    Raises `ConfigError` if no decoder block is found, or one is compiled already, has a `forward` of its own, or holds
    units of FSDP1 or checkpoints.
    """
    blocks = [unwrapped(site.module) for site in decoder_blocks(model)]
    if not blocks:
        raise ConfigError("compiling by block needs decoder blocks, but the model has no ModuleList of blocks")
    for block in blocks:
        _check(block)
    if postponed(model, partial(compile_blocks, fullgraph=fullgraph, **options)):
        return model
    kinds: dict[Any, Any] = {}
    for block in blocks:
        alike = type(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        if alike not in kinds:
            run = torch.compile(_traced(type(block).__name__), fullgraph=fullgraph, **options)
            members = {"run_compiled": staticmethod(run), "prepared": weakref.WeakSet()}
            kinds[alike] = Extension.of(type(block), _Compiled, **members)
        block.__class__ = kinds[alike]
    at_release(model, partial(_undo, list(kinds.values()), weakref.WeakSet(blocks)))
    return model


def _check(block: nn.Module) -> None:
    what = None
    if isinstance(block, _Compiled) or block._compiled_call_impl is not None:
        what = "is compiled already"
    elif "forward" in vars(block):
        what = "has a forward of its own, which somebody has set; compile it before that"
    elif any(name in module._modules for module in block.modules() for name in WRAPPER_SEGMENTS):
        what = "holds units of FSDP1, or checkpoints; use FSDP2, or checkpoints around whole blocks"
    if what is not None:
        raise ConfigError(f"compiling by block: expected decoder blocks as their class has them, found that one {what}")


class _Compiled(Extension):
    """A block whose `forward` is compiled."""

    run_compiled: ClassVar[Callable[..., Any] | None]
    prepared: ClassVar[weakref.WeakSet[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own, compiled unless there is a cache, in which each block has another place."""
        run = self.run_compiled
        if run is None or any(isinstance(each, Cache) for each in (*args, *kwargs.values())):
            return _own_forward(self, *args, **kwargs)
        block = cast("nn.Module", self)
        if block not in self.prepared:
            _prepare(block)
            self.prepared.add(block)
        try:
            return run(self, *args, **kwargs)
        except FailOnRecompileLimitHit as limit:
            warnings.warn(f"a call of a block is not compiled: {limit}", stacklevel=2)
            return _own_forward(self, *args, **kwargs)


def _prepare(block: nn.Module) -> None:
    """Read every packed weight once: FSDP2 makes a plain parameter of it, which changes its class when it is read."""
    for module in quantized_modules(block):
        for name in packed_names(module):
            getattr(module, name)


def _own_forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    return super(_Compiled, block).forward(*args, **kwargs)


def _traced(kind: str) -> Callable[..., Any]:
    """`_own_forward` with code of its own: by its code, and the name of that, torch keeps graphs and shapes apart."""
    code = _own_forward.__code__.replace(co_name=f"{kind}_{next(_serials)}")
    return FunctionType(code, globals())


def _undo(kinds: Sequence[Any], blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        if type(block) in kinds:
            block.__class__ = type(block).__bases__[-1]
    for kind in kinds:
        kind.run_compiled = None  # of blocks that FSDP2 has given another class since
