"""Refuse a configuration that describes a larger model than the headers of the checkpoint can fill."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from surgery.checkpoint import Checkpoint
from surgery.errors import WeightsMismatchError

__all__ = ["bounded", "check_sizes"]

#: Names under which configurations of transformers have a number of layers, and a width that a weight has too.
_LAYERS = re.compile(r"(n|num)_(\w+_)?layers?|(en|de)coder_layers")
_WIDTHS = re.compile(r"(\w+_)?(vocab|hidden|intermediate)_size|n_embd|n_inner|d_model|d_ff|(\w+_)?ffn_dim")

#: Layers that any checkpoint may have, and how often a layer or a width is in the headers less than once: tensors are
#: merged, split, or shared.
_FEW_LAYERS = 1000
_LAYERS_A_TENSOR = 8
_WIDTHS_A_DIMENSION = 64

#: Parameters that are tied once they are all there are counted one by one while a model is built.
_TIES = 8
_FEW_ELEMENTS = 1 << 20


def check_sizes(checkpoint: Checkpoint) -> None:
    """Compare numbers of layers and widths in `config.json` with the headers, before a class expands them.

    Raises `WeightsMismatchError`.
    """
    index = checkpoint.index
    layers = max(_FEW_LAYERS, _LAYERS_A_TENSOR * len(index))
    width = max((size for entry in index.values() for size in entry.shape), default=0)
    for key, value in _numbers(checkpoint.config or {}):
        if _LAYERS.fullmatch(key) and value > layers:
            raise _contradiction(checkpoint, f"{key} is {_said(value)}", f"{len(index)} tensors")
        if _WIDTHS.fullmatch(key) and value > _WIDTHS_A_DIMENSION * width:
            raise _contradiction(checkpoint, f"{key} is {_said(value)}", f"no dimension above {width:,}")


@contextmanager
def bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """Stop building a model in this thread, once it has several times as many elements as the checkpoint.

    Every element fills one parameter, whether tensors are merged or split on the way; tied parameters are counted each.
    Raises `WeightsMismatchError` from within the constructor.
    """
    stored = sum(entry.numel for entry in checkpoint.index.values())
    left = _TIES * stored + _FEW_ELEMENTS
    builder = threading.get_ident()

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != builder:
            return
        left -= parameter.numel()
        if left < 0:
            many = f"a model of more than {_TIES * stored + _FEW_ELEMENTS:,} elements"
            raise _contradiction(checkpoint, f"it describes {many}", f"{stored:,} elements")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of `config` and of the configurations inside it, by its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif type(value) is int:
            yield key, value


def _said(number: int) -> str:
    return f"{number:,}" if number < 10**18 else f"a number of {len(str(number))} digits"


def _contradiction(checkpoint: Checkpoint, said: str, held: str) -> WeightsMismatchError:
    return WeightsMismatchError(
        f"{checkpoint.path}: config.json and the weights are not of the same model: {said}, but the headers of the "
        f"weights have {held}. Get config.json and the weights from the same place",
        path=checkpoint.path,
    )
