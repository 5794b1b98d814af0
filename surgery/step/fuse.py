"""Fuse the 4-bit LoRA layers of a model: each computes by one function, and those that share an input together."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.comptime import comptime
from torch.nn.modules.module import _has_any_global_hook

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.model.fqn import clean, join, split
from surgery.model.tree import sites
from surgery.passes.lifetime import at_release, keep
from surgery.quantizers.stack import as_bytes
from surgery.step.dequantize import Workspace
from surgery.step.fused import Adapted, Choice, products

__all__ = ["PATCH", "forward", "fuse", "group"]

logger = logging.getLogger("surgery")

#: The patch that has a layer's forward computed here.
PATCH = "peft.fused-4bit-lora"

#: Names of layers that attention, or an MLP, gives the same input, in the order in which it calls them. A layer that is
#: given another one is found out, and computed by itself from then on; one of another width is so at once.
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))

#: Attributes with hooks of a module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Ready(NamedTuple):
    """The products of layers that have not been called yet, for the input `x` as it was in that version."""

    group: _Group
    x: torch.Tensor
    version: int
    products: dict[int, torch.Tensor]

    def take(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The product of `layer`; None if it was not computed of this `x`, or must not have a gradient."""
        if self.x is not x or self.version != x._version or not torch.is_grad_enabled():
            return None
        return self.products.pop(id(layer), None)


@dataclass(eq=False)
class _Fused:
    """A workspace and, until they are all called, the products of the last group; for the layers of one model."""

    workspace: Workspace
    ready: _Ready | None = None


@dataclass(eq=False)
class _Group:
    """Layers that are given the same input, one after the other."""

    layers: list[weakref.ref[Any]]
    shared: _Fused

    def alive(self) -> list[Any]:
        """The layers that are there."""
        return [found for found in (reference() for reference in self.layers) if found is not None]

    def from_(self, layer: Any) -> list[Any]:
        """`layer` and those after it."""
        alive = self.alive()
        return alive[alive.index(layer) :] if layer in alive else [layer]  # another thread may have moved it


#: Whether the log has it that layers are traced.
_told: list[bool] = []

_groups: weakref.WeakKeyDictionary[nn.Module, _Group] = weakref.WeakKeyDictionary()


def fuse(model: nn.Module, *, dequantized_bytes: int = 0) -> int:
    """Have the 4-bit LoRA layers of `model` compute as `products` describes it; returns how many there are.

    dequantized_bytes: weights that are dequantized once, and kept in 16 bits from then on, the first ones that are
    used; the others are dequantized for each product. Raises `ConfigError` for less than 0.

    Until `surgery.release(model)` or its collection. A call that the functions are not for is PEFT's own, as before: in
    evaluation, with several active adapters or none, merged, with DoRA or another variant of LoRA, with a bias of
    LoRA's, with adapters by sample, with hooks inside of the layer, under an autocast to another dtype than the
    layer's, and in code that `torch.compile` traces.
    """
    from peft.tuners.lora.bnb import Linear4bit

    if dequantized_bytes < 0:
        raise ConfigError(f"dequantized_bytes: expected 0 or more; got {dequantized_bytes}")
    layers = {clean(site.fqn): site.module for site in sites(model) if isinstance(site.module, Linear4bit)}
    if not layers:
        return 0
    shared = _Fused(Workspace(dequantized_bytes))
    for together in _sharing(layers):
        _join(together, shared)
    scoped = patches.on(PATCH, list(layers.values()))
    with patches.transaction(scoped, reason=f"the LoRA layers of a {type(model).__name__} are fused") as transaction:
        keep(model, transaction.receipts)
        transaction.commit()
    if not any(map(_factors, layers.values())):
        logger.warning(
            "surgery: the LoRA layers of %s compute as without fusing: none has one active adapter, unwrapped and of "
            "plain LoRA, as FSDP1 and DoRA leave none",
            type(model).__name__,
        )
    at_release(model, partial(_forget, weakref.WeakSet(layers.values())))
    return len(layers)


def _forget(layers: Iterable[nn.Module]) -> None:
    """Let go of the memory that `layers` compute in, and of weights that are kept for them."""
    for layer in layers:
        left = _groups.pop(layer, None)
        if left is not None:
            left.shared.ready = None  # which knows its group


def group(layers: Sequence[nn.Module], workspace: Workspace) -> None:
    """Have `layers`, which are given the same input one after the other, computed together by `forward`."""
    _join(layers, _Fused(workspace))


def _join(layers: Sequence[nn.Module], shared: _Fused) -> None:
    new = _Group([weakref.ref(layer) for layer in layers], shared)
    _groups.update((layer, new) for layer in layers)


def _sharing(layers: Mapping[str, nn.Module]) -> Iterable[Sequence[nn.Module]]:
    """The layers in groups: those of one width with names in a row of `SHARING` in one parent, others by themselves."""
    left = dict(layers)
    for fqn in layers:
        parent, leaf = split(fqn)
        names = next((row for row in SHARING if leaf in row), (leaf,))
        together = [left.pop(join(parent, name), None) for name in names]
        found = [layer for layer in together if layer is not None]
        yield from (list(alike) for _, alike in groupby(found, key=lambda layer: layer.in_features))


def forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The output of `layer`, `(..., out)` in the dtype of `x`; None where PEFT's own forward is to be called."""
    if torch.compiler.is_compiling():  # first: Dynamo loses gradients in what follows
        comptime(_tell)
        return None
    mine = _groups.get(layer)
    if mine is None:
        return None
    shared = mine.shared
    ready = shared.ready  # read once: another thread may put its own there
    if ready is not None:
        found = ready.take(layer, x)
        if not ready.products or found is None:
            shared.ready = None  # before anything is computed: it holds the graph behind `x`
        if found is not None:
            return found
        _part(ready, layer)
    if not torch.is_grad_enabled() or not x.numel():
        return None
    return _together(_groups[layer], layer, x)


def _tell(_context: object) -> None:
    """Say so, while torch.compile traces, of the first layer that is left to PEFT for that."""
    if not _told:
        _told.append(True)
        logger.warning(
            "surgery: fused layers compute as PEFT's in code that torch.compile traces: compile, or fuse, but not both"
        )


def _part(ready: _Ready, layer: Any) -> None:
    """Have layers of which nobody has asked for what was computed be a group of their own from now on.

    They are given another input, as `layer` was, or are not called at all, as where blocks share keys and values.
    """
    old = ready.group
    left = [member for member in old.alive() if id(member) in ready.products]
    moved = old.from_(layer) if layer in left else left
    old.layers = [reference for reference in old.layers if reference() not in moved]
    _join(moved, old.shared)


def _together(mine: _Group, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The product of `layer`, and those of the layers after it, which are kept until they are called."""
    dtypes = _dtypes(layer, x)
    if dtypes is None:
        return None
    members = list(takewhile(lambda member: member is layer or _dtypes(member, x) == dtypes, mine.from_(layer)))
    adapted = [_adapted(member, x) for member in members]
    if any(each.dropped is not None for each in adapted):
        adapted = [each if each.dropped is not None else each._replace(dropped=x) for each in adapted]
    found, *others = products(x, adapted, Choice(*dtypes, mine.shared.workspace))
    if others:
        left = {id(member): product for member, product in zip(members[1:], others, strict=True)}
        mine.shared.ready = _Ready(mine, x, x._version, left)
    return found


def _dtypes(layer: Any, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes that the base weight, and the adapter, are multiplied in; None if the layer cannot be fused now."""
    factors = _factors(layer)
    if factors is None:
        return None
    base, (a, b, _) = layer._modules["base_layer"], factors
    is_hooked = _has_any_global_hook() or any(map(_is_hooked, (base, *factors)))  # type: ignore[no-untyped-call]
    if is_hooked or not base.compute_type_is_set:
        return None
    dtype = base.compute_dtype or x.dtype
    if _state(base).dtype != dtype:
        return None
    if not torch.is_autocast_enabled(x.device.type):
        of_lora = a.weight.dtype if layer.cast_input_dtype_enabled else x.dtype
        return (dtype, of_lora) if of_lora == a.weight.dtype == b.weight.dtype else None
    # On other devices PEFT does not see that there is autocast.
    return (dtype, dtype) if x.is_cuda and torch.get_autocast_dtype("cuda") == dtype else None


def _factors(layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Module] | None:
    """A, B and dropout of the one adapter that is active in `layer`; None if there is another number, or more to it.

    Under FSDP they may be units of their own, whose hooks gather them; they are of other classes then.
    """
    held = layer._modules
    active = [name for name in layer.active_adapters if name in held["lora_A"]._modules]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    a, b = held["lora_A"]._modules[active[0]], held["lora_B"]._modules[active[0]]
    is_plain = isinstance(a, nn.Linear) and isinstance(b, nn.Linear) and not {type(a), type(b)} - {nn.Linear}
    return (a, b, held["lora_dropout"]._modules[active[0]]) if is_plain and b.bias is None else None


def _adapted(layer: Any, x: torch.Tensor) -> Adapted:
    name = next(name for name in layer.active_adapters if name in layer.scaling)
    held = layer._modules
    base, dropout = held["base_layer"], held["lora_dropout"]._modules[name]
    with torch._C.DisableTorchFunctionSubclass():  # for each of its operations bitsandbytes goes through Python
        packed = as_bytes(base.weight)
    return Adapted(
        packed=packed,
        state=_state(base),
        bias=base.bias,
        a=held["lora_A"]._modules[name].weight,
        b=held["lora_B"]._modules[name].weight,
        scaling=layer.scaling[name],
        dropped=dropout(x) if dropout.training and getattr(dropout, "p", 0.0) > 0 else None,
    )


def _state(base: Any) -> Any:
    return getattr(base.weight, "quant_state", None) or base.quant_state


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its class; accelerate's hooks have moved the input already."""
    own = vars(module)
    return any(map(own.get, HOOKS)) or ("forward" in own and "_hf_hook" not in own)
