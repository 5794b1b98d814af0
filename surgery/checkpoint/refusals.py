"""Refusals of checkpoints that are quantized in a way that is not read here, or described as far larger ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.index import Index
from surgery.checkpoint.packed import PackedWeight, configuration
from surgery.errors import CheckpointError, WeightsMismatchError

__all__ = ["contradiction", "require_usable"]

#: What tells that weights are stored in a way that is not read here: the end of a tensor's name.
_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_scale_inv": "fp8",
    "_blocks": "MXFP4",
}

#: Names that users know, by what config.json calls them.
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
}


def require_usable(
    index: Index, config: Mapping[str, Any] | None, packed: Mapping[str, PackedWeight], *, path: Path
) -> None:
    """Raise `CheckpointError` for weights that are quantized in a way that is not read here, by `config` or a tensor's
    name, and for `packed` ones of two kinds. Raise `WeightsMismatchError` for a `config` with far larger numbers than
    the headers.
    """
    _require_one_kind(packed, path=path)
    declared = _declared(config or {})
    method = _METHODS.get(declared or "", declared)
    sign = f"its config.json has a quantization_config ({declared})"
    name = None
    bits = _bits(config or {})
    held = next((8 // weight.settings.values_per_byte for weight in packed.values()), None)
    if declared == "bitsandbytes" and (held is None or bits not in (None, held)):
        ends = {4: "*.weight.quant_state.bitsandbytes__nf4 or fp4", 8: "*.SCB"}
        names = ends[bits] if bits else " or ".join(ends.values())
        found = "none of its tensors is" if held is None else f"its tensors are packed in {held}"
        raise CheckpointError(
            f"The checkpoint at {path} is declared to be in {bits or '4 or 8'} bits of bitsandbytes by its "
            f"config.json, and {found}. Expected tensors named {names}: get config.json and the weights from the same "
            "place, or remove quantization_config from config.json.",
            path=path,
        )
    if packed and declared in (None, "bitsandbytes"):
        _require_agreement(index, config or {}, path=path)
        return
    if declared is None:
        signs = ((name, how) for name in index for end, how in _SUFFIXES.items() if _ends(name, end))
        name, method = next(signs, (None, None))
        sign = f"it holds the tensor {name!r}"
    if method is not None:
        raise CheckpointError(
            f"The checkpoint at {path} is quantized already, in {method}: {sign}. Expected 16- or 32-bit weights, or "
            f"packed weights of bitsandbytes: {_remedy(method)}.",
            path=path,
            tensor=name,
        )
    _require_agreement(index, config or {}, path=path)


def _remedy(method: str) -> str:
    if method in ("MXFP4", "fp8"):
        return (
            "use the checkpoint that it was made from, or write one in 16 bits first, by from_pretrained(..., "
            f"quantization_config={'Mxfp4Config' if method == 'MXFP4' else 'FineGrainedFP8Config'}(dequantize=True)) "
            "and save_pretrained of transformers"
        )
    return "use the checkpoint that it was made from"


def _ends(name: str, end: str) -> bool:
    # Only experts are stored in MXFP4, in blocks with scales beside them.
    return name.endswith(end) and (end != "_blocks" or "experts" in name)


def _require_one_kind(packed: Mapping[str, PackedWeight], *, path: Path) -> None:
    """Raise `CheckpointError` where packed weights differ in more than shape: no option describes two kinds."""
    kinds: dict[str, str] = {}
    for weight in packed.values():
        kinds.setdefault(weight.settings.kind, weight.name)
    if len(kinds) > 1:
        found = "; ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise CheckpointError(
            f"The packed weights at {path} are of {len(kinds)} kinds: {found}. Expected one: write them in 16 bits "
            "(surgery dequantize), and quantize that.",
            path=path,
            tensor=list(kinds.values())[1],
        )


def _declared(config: Mapping[str, Any]) -> str | None:
    """Name of the quantization method that a config declares; bitsandbytes' early ones lack it."""
    found = configuration(config)
    if found is None:
        return None
    is_bitsandbytes = any(found.get(f"{lead}load_in_{bits}bit") for lead in ("", "_") for bits in (4, 8))
    return str(found.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else "a method without a name"))


def _bits(config: Mapping[str, Any]) -> int | None:
    """The bits of bitsandbytes that a config declares; None for another method, or where it leaves that open."""
    found = configuration(config) or {}
    if _declared(config) != "bitsandbytes":
        return None
    said = (bits for bits in (4, 8) if found.get(f"load_in_{bits}bit", found.get(f"_load_in_{bits}bit")))
    return next(said, None)


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
