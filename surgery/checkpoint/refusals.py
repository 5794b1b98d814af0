"""Refusals of checkpoints that are quantized already, or whose config.json describes a far larger model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.index import Index
from surgery.errors import CheckpointError, WeightsMismatchError

__all__ = ["contradiction", "require_usable"]

# Names of the tensors that bitsandbytes (4 and 8 bits), GPTQ, AWQ and compressed-tensors write.
_TENSOR_SUFFIXES = (".absmax", ".nested_absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".weight_packed")
_TENSOR_INFIX = ".quant_state."


def require_usable(index: Index, config: Mapping[str, Any] | None, *, path: Path) -> None:
    """Raise `CheckpointError` for weights that are quantized, by `config` or a tensor's name: quantizing them again
    would give garbage, silently. Raise `WeightsMismatchError` for a `config` with far larger numbers than the headers.
    """
    method = _configured_method(config or {})
    name = next((name for name in index if name.endswith(_TENSOR_SUFFIXES) or _TENSOR_INFIX in name), None)
    if method is not None or name is not None:
        sign = f"it holds the tensor {name!r}"
        if method is not None:
            name, sign = None, f"its config.json has a quantization_config ({method})"
        raise CheckpointError(
            f"The checkpoint at {path} is quantized already: {sign}. Expected 16- or 32-bit weights: use the "
            "checkpoint that it was made from.",
            path=path,
            tensor=name,
        )
    _require_agreement(index, config or {}, path=path)


def _configured_method(config: Mapping[str, Any]) -> str | None:
    """Name the quantization method that a model config, or the text part of a multimodal one, declares."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        return str(method or "of unknown method")
    return None


#: Names under which configurations of transformers have a number of layers, and a width that a weight has too.
_LAYERS = re.compile(r"(n|num)_(\w+_)?layers?|(en|de)coder_layers")
_WIDTHS = re.compile(r"(\w+_)?(vocab|hidden|intermediate)_size|n_embd|n_inner|d_model|d_ff|(\w+_)?(ffn|head)_dim")

#: Limits: layers and widths that any model may have, layers a tensor, multiples of the widest dimension. They are wide,
#: since tensors are merged, split or shared, so that the headers need not have the configuration's numbers.
_FEW_LAYERS = 1000
_LAYERS_A_TENSOR = 8
_NARROW = 1 << 20
_WIDTHS_A_DIMENSION = 64


def _require_agreement(index: Index, config: Mapping[str, Any], *, path: Path) -> None:
    """Refuse a number of layers, or a width, far above all that the headers have.

    Configuration classes make lists as long as these numbers, and models as large, before any weight is looked for.
    """
    layers = max(_FEW_LAYERS, _LAYERS_A_TENSOR * len(index))
    widest = max((size for entry in index.values() for size in entry.shape), default=0)
    width = max(_NARROW, _WIDTHS_A_DIMENSION * widest)
    for key, value in _numbers(config):
        if _LAYERS.fullmatch(key) and value > layers:
            raise contradiction(path, f"{key} is {_said(value)}", f"{len(index)} tensors")
        if _WIDTHS.fullmatch(key) and value > width:
            raise contradiction(path, f"{key} is {_said(value)}", f"no dimension above {widest:,}")


def contradiction(path: Path, said: str, held: str) -> WeightsMismatchError:
    """The error for a config.json that contradicts the headers: it `said` one thing, they `held` another."""
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
