"""Positions that a model counts itself: they go up by one, so that nobody needs to look for packed samples in them.

transformers looks in every step where positions begin anew, and waits for the GPU to answer. While a graph is recorded
it cannot ask, and masks attention as if samples were packed, which runs other kernels. Positions that a caller gives,
such as those of a collator that packs, are looked at as ever.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import model_surgery_patches as patches
from surgery.passes.lifetime import at_release, keep

logger = logging.getLogger("surgery")

__all__ = ["PATCHES", "called", "counted", "counter", "trust_own_positions"]

#: Patches that are told here which positions a model has counted.
PATCHES = (
    "transformers.own-positions",
    "transformers.own-positions-in-flash",
    "transformers.causal-while-recorded",
)

#: An attribute of position ids that a model has counted.
MARK = "_counted_by_model"


class _Calls(threading.local):
    """The calls of models that a thread is in: whose, and whether the model counts positions."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, bool]] = []

    def end(self, module: nn.Module) -> None:
        """Forget the call of `module`, and those in it, which an interrupt may have left behind."""
        place = next((n for n, (called, _) in enumerate(self.stack) if called is module), len(self.stack))
        del self.stack[place:]


_calls = _Calls()


def trust_own_positions(model: nn.Module) -> None:
    """Have the transformers models in `model` not look for packed samples where their caller gives no positions.

    Until `surgery.release(model)`. A release of transformers that the patches do not fit looks as ever.
    """
    found = [module for module in model.modules() if _place(module) is not None]
    if not found:
        return
    try:
        with patches.transaction(
            *(patches.on(name, found) for name in PATCHES), reason="positions that a model counts are not looked at"
        ) as transaction:
            keep(model, transaction.receipts)
            transaction.commit()
    except patches.PatchError as error:
        logger.warning("surgery: packed samples are looked for in every step, as without it: %s", error)
        return
    handles = [module.register_forward_pre_hook(_begin, with_kwargs=True) for module in found]
    handles += [module.register_forward_hook(_end, always_call=True) for module in found]
    at_release(model, lambda: _remove(handles))


def counted(position_ids: torch.Tensor) -> bool:
    """Whether the model that is being called has counted `position_ids`, which are marked then."""
    if not _calls.stack or not _calls.stack[-1][1]:
        return False
    setattr(position_ids, MARK, weakref.ref(_calls.stack[-1][0]))
    return True


def called(*_: object) -> nn.Module | None:
    """The model that is being called, which patches are limited by."""
    return _calls.stack[-1][0] if _calls.stack else None


def counter(position_ids: object) -> nn.Module | None:
    """The model that has counted `position_ids`: a recomputed layer has the same ones, outside of the model's call."""
    mark = getattr(position_ids, MARK, None)
    return None if mark is None else mark()


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    place = _place(module)
    given = args[place] if place is not None and len(args) > place else kwargs.get("position_ids")
    _calls.end(module)
    _calls.stack.append((module, given is None))


def _end(module: nn.Module, *_: object) -> None:
    _calls.end(module)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _place(module: nn.Module) -> int | None:
    """Find the place of position ids among the arguments of a model of transformers; None for other modules."""
    kind: Any = type(module)
    return _place_in(kind)


@functools.cache
def _place_in(kind: Any) -> int | None:
    if not hasattr(kind, "get_input_embeddings"):
        return None
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return names.index("position_ids") if "position_ids" in names else None
