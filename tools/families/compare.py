"""Differences between two models, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

__all__ = ["differences", "different_losses", "different_tensors"]

#: Number of names printed of a long list.
SHOWN: Final = 4


def differences(found: nn.Module, wanted: nn.Module) -> Iterator[str]:
    """Compare names, dtypes, shapes and bits of all parameters and buffers, and the quant_state of 4-bit layers."""
    yield from different_tensors("parameters", _parameters(found), _parameters(wanted))
    yield from different_tensors("buffers", dict(found.named_buffers()), dict(wanted.named_buffers()))
    yield from different_tensors("quantization states", _states(found), _states(wanted))
    trainable = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (found, wanted)]
    if trainable[0] != trainable[1]:
        yield _say("trained on one side only", trainable[0] ^ trainable[1])


def different_tensors(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Compare tensors (or plain values) of the same name; one sentence for each kind of difference."""
    kinds: dict[str, list[str]] = {
        "here alone": sorted(found.keys() - wanted.keys()),
        "of stock alone": sorted(wanted.keys() - found.keys()),
    }
    for name in sorted(found.keys() & wanted.keys()):
        kind = _difference(found[name], wanted[name])
        if kind:
            kinds.setdefault(kind, []).append(name)
    yield from (_say(f"{what}: {kind}", names) for kind, names in kinds.items() if names)


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return "" if found == wanted else f"{found} here, {wanted} in stock"
    if found.dtype != wanted.dtype:
        return f"{found.dtype} here, {wanted.dtype} in stock"
    if found.shape != wanted.shape:
        return f"{tuple(found.shape)} here, {tuple(wanted.shape)} in stock"
    if found.device != wanted.device:
        return f"on {found.device} here, on {wanted.device} in stock"
    if torch.equal(_bits(found), _bits(wanted)):
        return ""
    return "other bits" if not found.is_floating_point() else f"off by {_distance(found, wanted):.1e}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return (found.detach().double() - wanted.detach().double()).abs().max().item()


def different_losses(found: list[float], wanted: list[float], tolerance: float) -> Iterator[str]:
    """List losses that differ by more than the relative `tolerance`."""
    for step, (one, other) in enumerate(zip(found, wanted, strict=True), start=1):
        if not abs(one - other) <= tolerance * max(abs(other), 1.0):
            yield f"loss {step}: {one:.6f} here, {other:.6f} in stock"


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters under all their names, so that ties are compared."""
    return dict(model.named_parameters(remove_duplicate=False))


def _states(model: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    layers: Iterator[tuple[str, Any]] = ((n, m) for n, m in model.named_modules() if isinstance(m, Linear4bit))
    return {
        f"{name}.{key}": value
        for name, module in layers
        for key, value in {**module.quant_state.as_dict(), "compute_dtype": module.compute_dtype}.items()
    }


def _say(what: str, names: Any) -> str:
    names = sorted(names)
    return f"{what}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
