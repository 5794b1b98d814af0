"""Put loaded tensors into the model that they belong to, as it is by then: adapted, maybe sharded on meta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from surgery.adapters.deferred import Drawing
from surgery.passes.buffers import ShardBuffer, ShardBuffers

__all__ = ["install", "install_initials"]


def install(model: nn.Module, parts: ShardBuffers) -> None:
    """Give every module of `model` what was loaded for it, and empty `parts`.

    A parameter that is sharded on meta becomes the same shard over the loaded memory; another one becomes what the
    quantizer makes of it, or a plain parameter. Tied ones stay tied, and `requires_grad` stays what it is. Copies that
    PEFT has made of modules (`modules_to_save`) get copies of the same values.
    """
    copies = _copies(model)
    while parts.found:
        _, part = parts.found.popitem()
        _set_state(part, parts)
        new: torch.Tensor | None = None
        cloned: dict[torch.Tensor, torch.Tensor] = {}
        for module, leaf in part.target.places:
            if new is None:
                new = _made(module, leaf, part, parts)
            _put(module, leaf, new)
            for copy in copies.get(module, ()):
                old = _held(copy, leaf)
                if old not in cloned:  # copies that PEFT has tied stay tied
                    cloned[old] = _made(copy, leaf, part, parts, clone=True)
                _put(copy, leaf, cloned[old])


def install_initials(drawing: Drawing) -> None:
    """Give adapters on meta, which may have become shards there, the values that were drawn for them."""
    while drawing.values:
        initial, values = drawing.initials.parameters[len(drawing.values) - 1], drawing.values.pop()
        module, leaf = initial.places[0]
        new = _like(_held(module, leaf), values)
        for module, leaf in initial.places:
            _put(module, leaf, new)


def _set_state(part: ShardBuffer, parts: ShardBuffers) -> None:
    if part.target.is_quantized:
        for module, _ in part.target.places:
            parts.quantizer.set_state(module, part.state)


def _made(module: nn.Module, leaf: str, part: ShardBuffer, parts: ShardBuffers, *, clone: bool = False) -> torch.Tensor:
    """What `module` is to hold, in the place and in the form of what it holds now."""
    old = _held(module, leaf)
    data = part.tensor().clone() if clone else part.tensor()
    if not isinstance(old, nn.Parameter):
        return data
    if part.target.is_quantized and not isinstance(old, DTensor):
        return parts.quantizer.parameter(module, data, part.state)
    return _like(old, data)


def _like(old: torch.Tensor, data: torch.Tensor) -> nn.Parameter:
    """A parameter over `data`: the same shard of the same tensor, if `old` is one."""
    if isinstance(old, DTensor):
        data = _shard_of(old, data)
    return nn.Parameter(data, requires_grad=old.requires_grad)


def _shard_of(old: DTensor, data: torch.Tensor) -> DTensor:
    if data.device.type == old.device_mesh.device_type:
        return DTensor.from_local(
            data, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    # A shard that is to wait on the CPU, which `from_local` would move to the device of the mesh.
    with torch.no_grad():
        shard: Any = torch.empty_like(old, device=data.device)
        shard.to_local().copy_(data)
    return shard  # type: ignore[no-any-return]


def _held(module: nn.Module, leaf: str) -> torch.Tensor:
    found = module._parameters.get(leaf)
    return module._buffers[leaf] if found is None else found  # type: ignore[return-value]  # what a checkpoint fills


def _put(module: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    tensors: Any = module._parameters if leaf in module._parameters else module._buffers
    tensors[leaf] = tensor


def _copies(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Modules -> the trainable copies that PEFT keeps beside them."""
    found: dict[nn.Module, list[nn.Module]] = {}
    for wrapper in model.modules():
        original, saved = getattr(wrapper, "original_module", None), getattr(wrapper, "modules_to_save", None)
        if not isinstance(original, nn.Module) or not isinstance(saved, nn.ModuleDict):
            continue
        for copy in saved.values():
            for module, twin in _pairs(original, copy):
                found.setdefault(module, []).append(twin)
    return found


def _pairs(original: nn.Module, copy: nn.Module) -> Iterable[tuple[nn.Module, nn.Module]]:
    twins: dict[str, nn.Module] = dict(copy.named_modules())
    pairs: Iterator[tuple[nn.Module, nn.Module]] = (
        (module, twins[name]) for name, module in original.named_modules() if name in twins
    )
    return pairs
