"""Models that wait for their weights: whoever uses one too early is told what to call, and nothing is computed."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn

import patches
from surgery.adapters.upstream import WAITING
from surgery.errors import NotFilledError
from surgery.quantizers.base import quantized_modules

__all__ = ["is_waiting", "stop_waiting", "wait"]

_waiting: weakref.WeakKeyDictionary[nn.Module, weakref.finalize[..., nn.Module]] = weakref.WeakKeyDictionary()


def wait(model: nn.Module) -> None:
    """Have `model`, which is on meta, refuse to be used until `stop_waiting`; adapters of PEFT keep their values."""
    bundle = [patches.on(name, [model]) for name in WAITING]
    with patches.transaction(*bundle, reason="a bound model waits for its weights") as transaction:
        _waiting[model] = weakref.finalize(model, patches.revert, *transaction.receipts)
        transaction.commit()
    kind: Any = type(model)
    model.__class__ = _refusing(kind)


def is_waiting(model: nn.Module) -> bool:
    """Whether `model` was bound, and is not filled yet."""
    return model in _waiting


def stop_waiting(model: nn.Module) -> None:
    """Make `model` again what it was before `wait`."""
    _waiting.pop(model)()
    model.__class__ = type(model).__mro__[2]


class _Refusing:
    """A bound model until it is filled: what would need its weights raises `NotFilledError`."""

    def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: there are no values yet."""
        raise NotFilledError("state_dict()")

    def load_state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: what it loads would be replaced."""
        raise NotFilledError("load_state_dict()")

    def resize_token_embeddings(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: new rows are initialized from the others."""
        raise NotFilledError("resize_token_embeddings()")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  # upstream's signature
        """Casts, of all but packed weights; a move from meta is refused."""
        model: Any = self
        try:
            stays = fn(torch.empty(1, device="meta")).is_meta
        except NotImplementedError:  # of torch, for a copy from meta
            stays = False
        if not stays:
            raise NotFilledError("a move to a device")
        packed = {module: module._parameters["weight"] for module in quantized_modules(model)}
        super()._apply(fn, recurse)  # type: ignore[misc]  # always mixed into an nn.Module
        for module, weight in packed.items():
            module._parameters["weight"] = weight
        return model


@functools.cache
def _refusing(kind: Any) -> Any:
    @functools.wraps(kind.forward)
    def forward(_self: object, *_args: Any, **_kwargs: Any) -> Any:
        raise NotFilledError("forward")

    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward}
    return type(kind.__name__, (_Refusing, kind), members)
