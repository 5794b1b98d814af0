"""Refuse a config.json that describes a model far larger than the headers of the weights can fill."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.index import Index
from surgery.errors import WeightsMismatchError

__all__ = ["contradiction", "require_agreement"]

#: Names under which configurations of transformers have a number of layers, and a width that a weight has too.
_LAYERS = re.compile(r"(n|num)_(\w+_)?layers?|(en|de)coder_layers")
_WIDTHS = re.compile(r"(\w+_)?(vocab|hidden|intermediate)_size|n_embd|n_inner|d_model|d_ff|(\w+_)?(ffn|head)_dim")

#: Limits: layers and widths that any model may have, layers a tensor, multiples of the widest dimension. They are wide,
#: since tensors are merged, split or shared, so that the headers need not have the configuration's numbers.
_FEW_LAYERS = 1000
_LAYERS_A_TENSOR = 8
_NARROW = 1 << 20
_WIDTHS_A_DIMENSION = 64


def require_agreement(index: Index, config: Mapping[str, Any] | None, *, path: Path) -> None:
    """Raise `WeightsMismatchError` if `config` has a number of layers, or a width, far above all that the headers have.

    Configuration classes make lists as long as these numbers, and models as large, before any weight is looked for.
    """
    layers = max(_FEW_LAYERS, _LAYERS_A_TENSOR * len(index))
    widest = max((size for entry in index.values() for size in entry.shape), default=0)
    width = max(_NARROW, _WIDTHS_A_DIMENSION * widest)
    for key, value in _numbers(config or {}):
        if _LAYERS.fullmatch(key) and value > layers:
            raise contradiction(path, f"{key} is {_said(value)}", f"{len(index)} tensors")
        if _WIDTHS.fullmatch(key) and value > width:
            raise contradiction(path, f"{key} is {_said(value)}", f"no dimension above {widest:,}")


def contradiction(path: Path, said: str, held: str) -> WeightsMismatchError:
    """The error for a config.json that says one thing where the headers have another."""
    return WeightsMismatchError(
        f"{path}: config.json and the weights are not of the same model: {said}, but the headers of the weights have "
        f"{held}. Get config.json and the weights from the same place",
        path=path,
    )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of `config` and of the configurations inside it, by its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif type(value) is int:
            yield key, value


def _said(number: int) -> str:
    return f"{number:,}" if number < 10**18 else f"a number of {len(str(number))} digits"
