"""Refuse a checkpoint that someone has quantized before: quantizing it again would give garbage, silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

__all__ = ["require_unquantized"]

# Names of the tensors that bitsandbytes (4 and 8 bits), GPTQ, AWQ and compressed-tensors write.
_TENSOR_SUFFIXES = (
    ".absmax",
    ".nested_absmax",
    ".quant_map",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".weight_packed",
)
_TENSOR_INFIX = ".quant_state."


def require_unquantized(names: Iterable[str], config: Mapping[str, Any] | None, *, path: Path) -> None:
    """Raise `CheckpointError` if the config, or a tensor's name, says that the weights are quantized."""
    method = _configured_method(config or {})
    if method is not None:
        raise CheckpointError(
            f"The checkpoint at {path} is quantized already: its config.json has a quantization_config "
            f"({method}). Expected 16- or 32-bit weights: use the checkpoint that it was made from.",
            path=path,
        )
    name = next((name for name in names if name.endswith(_TENSOR_SUFFIXES) or _TENSOR_INFIX in name), None)
    if name is not None:
        raise CheckpointError(
            f"The checkpoint at {path} is quantized already: it holds the tensor {name!r}. "
            "Expected 16- or 32-bit weights: use the checkpoint that it was made from.",
            path=path,
            tensor=name,
        )


def _configured_method(config: Mapping[str, Any]) -> str | None:
    """Name the quantization method that a model config, or the text part of a multimodal one, declares."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        return str(method or "of unknown method")
    return None
