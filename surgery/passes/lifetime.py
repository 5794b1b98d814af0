"""Patches that a sharded model needs in order to run: from when it is built until it is released or collected."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, cast

from torch import nn

import patches

__all__ = ["as_context_manager", "keep", "release"]

_resident: weakref.WeakKeyDictionary[nn.Module, weakref.finalize[..., nn.Module]] = weakref.WeakKeyDictionary()


def keep(model: nn.Module, receipts: Iterable[patches.Receipt]) -> None:
    """Hold `receipts` for `model`: they are reverted by `release`, or when `model` is garbage-collected."""
    _resident[model] = weakref.finalize(model, patches.revert, *receipts)


def release(model: nn.Module) -> None:
    """Undo the resident patches of `model`, which cannot run sharded 4-bit layers after that. Twice is harmless."""
    undo = _resident.pop(model, None)
    if undo is not None:
        undo()  # of several threads, one does it


class _Releasing:
    """`with model:` releases at the end of the block."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        release(self)  # type: ignore[arg-type]  # always mixed into an nn.Module

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle is of the class as upstream has it: the patches belong to this very model. In the form of
        # protocol 1, since pickle wants what later ones make to be of the class that it was asked to pickle.
        constructor, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(1))
        plain = tuple(type(self).__mro__[2] if argument is type(self) else argument for argument in arguments)
        return (constructor, plain, *state)


@functools.cache
def _releasing(kind: Any) -> Any:
    return type(kind.__name__, (_Releasing, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def as_context_manager(model: nn.Module) -> nn.Module:
    """`model` itself, its class extended so that `with model:` releases it, as FSDP2 extends the class of a module."""
    kind: Any = type(model)
    model.__class__ = _releasing(kind)
    return model
