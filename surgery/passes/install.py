"""Pass `install`: loaded tensors into the model as it is by then: adapted, maybe sharded on meta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from surgery.adapters.deferred import Drawing
from surgery.errors import ConfigError
from surgery.model.tree import modules_of
from surgery.passes.base import Pass
from surgery.passes.loading import Loading
from surgery.passes.tensors import ShardBuffer

__all__ = ["Install", "install"]


@dataclass(frozen=True, kw_only=True)
class Install(Pass):
    """Give every parameter and persistent buffer what was loaded or drawn for it."""

    name = "install"

    loading: Loading

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, filled in place; nothing of it is left in the batches."""
        buffers = [buffer for batch in self.loading.batches for buffer in batch.buffers]
        for batch in self.loading.batches:
            batch.buffers.clear()
        if not buffers:
            raise ConfigError("nothing was loaded: install comes after read, quantize, exchange and relocate")
        if not all(buffer.is_complete for buffer in buffers):
            raise ConfigError("a tensor is not complete on this rank: install comes after exchange and relocate")
        install(model, buffers)
        for drawing, background in self.loading.drawings:
            background.wait()
            _install_drawn(drawing)
            drawing.go_on()
        return model


def install(model: nn.Module, buffers: list[ShardBuffer]) -> None:
    """Give every module of `model` what was loaded for it, and empty `buffers`.

    A parameter that is sharded on meta becomes the same shard over the loaded memory; another one becomes what the
    format makes of it, or a plain parameter. Tied ones stay tied, and `requires_grad` stays what it is. Copies that
    PEFT has made of modules (`modules_to_save`) get copies of the same values.
    """
    copies = _copies(model)
    while buffers:
        buffer = buffers.pop()
        if buffer.target.is_quantized and buffer.target.quant is not None:
            for module, leaf in buffer.target.places:
                buffer.target.quant.set_state(module, leaf, buffer.state)
        new: torch.Tensor | None = None
        cloned: dict[torch.Tensor, torch.Tensor] = {}
        for module, leaf in buffer.target.places:
            if new is None:
                new = _made(module, leaf, buffer)
            _put(module, leaf, new)
            for copy in copies.get(module, ()):
                old = _held(copy, leaf)
                if old not in cloned:  # copies that PEFT has tied stay tied
                    cloned[old] = _made(copy, leaf, buffer, clone=True)
                _put(copy, leaf, cloned[old])


def _install_drawn(drawing: Drawing) -> None:
    """Give adapters on meta, which may have become shards there, the values that were drawn for them."""
    while drawing.values:
        initial, values = drawing.deferred.parameters[len(drawing.values) - 1], drawing.values.pop()
        module, leaf = initial.places[0]
        new = _like(_held(module, leaf), values)
        for module, leaf in initial.places:
            _put(module, leaf, new)


def _made(module: nn.Module, leaf: str, buffer: ShardBuffer, *, clone: bool = False) -> torch.Tensor:
    """The new tensor of `module`, in the form of the one that it holds now."""
    old = _held(module, leaf)
    data = buffer.tensor().clone() if clone else buffer.tensor()
    if not isinstance(old, nn.Parameter):
        return data
    quant = buffer.target.quant
    if quant is not None and not isinstance(old, DTensor):
        return quant.parameter(module, data, buffer.state)
    return _like(old, data.to(old.dtype))  # a copy that PEFT trains may have been cast


def _like(old: torch.Tensor, data: torch.Tensor) -> nn.Parameter:
    """A parameter over `data`: the same shard of the same tensor, if `old` is one.

    One that is trained stays the same object, which an optimizer may have.
    """
    if isinstance(old, DTensor):
        return _shard_of(old, data)
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if not isinstance(old, nn.Parameter) or not old.requires_grad:
        return new
    torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]  # no annotation upstream
    return old


def _shard_of(old: DTensor, data: torch.Tensor) -> nn.Parameter:
    """A parameter that is the same shard as `old`, over `data`.

    By way of `DTensor.from_local`, which checks what is known here and moves data that waits on the CPU to the device
    of the mesh, and of `nn.Parameter`, which makes a `DTensor` of a `DTensor`, it takes ten times as long.
    """
    shard: Any = DTensor(data, old._spec, requires_grad=old.requires_grad)  # type: ignore[no-untyped-call]  # as FSDP2 does
    shard._is_param = True
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
    for wrapper in modules_of(model):
        original, saved = wrapper._modules.get("original_module"), wrapper._modules.get("modules_to_save")
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
