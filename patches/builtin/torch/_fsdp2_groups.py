"""Groups of FSDP2 whose parameters are alike, so that what is done to each can be done in one loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

__all__ = ["a_4bit_layer", "as_one"]


def a_4bit_layer(group: list[Any]) -> object:
    """The first quantized layer of the FSDPParams of a group, which stands for all: they belong to one model."""
    for parameter in group:
        module: object = parameter._module_info.module
        # `__dict__`, since attribute lookup is slow for a missing quant_state, and most groups of most models have
        # none. A loop, since `next` with a generator takes twice as long, and this runs in every gather.
        if module.__dict__.get("quant_state") is not None:
            return module
    return None


class _AsOne:
    """All FSDPParams of a group, which FSDP2 takes for one with many tensors, as tensor subclasses have them.

    It does to each what FSDP2 would, and calls nothing for it: FSDP2 itself calls 17 functions for each parameter that
    it has gathered, and 7 for each that it frees. Afterwards everything is as if it had.
    """

    fsdp_placement: Final = SimpleNamespace(dim=0)

    def __init__(self, group: list[Any]) -> None:
        self._group = group
        self._module_info = group[0]._module_info

    def init_all_gather_outputs(self, *_: object) -> None:
        """Nothing: they are there since the first gather."""

    def init_unsharded_param(self) -> None:
        """Nothing, likewise."""

    @property
    def all_gather_outputs(self) -> list[torch.Tensor]:
        """What the parameters are gathered into, one tensor each."""
        return [parameter.all_gather_outputs[0] for parameter in self._group]

    def alloc_all_gather_outputs(self) -> None:
        """Allocate the memory of all."""
        for parameter in self._group:
            tensor = parameter.all_gather_outputs[0]
            storage, size = tensor.untyped_storage(), tensor.nbytes
            if storage.nbytes() != size:
                storage.resize_(size)

    def to_unsharded(self) -> None:
        """Put the gathered parameters into their modules."""
        unsharded = type(self._group[0].sharded_state).UNSHARDED
        for parameter in self._group:
            place, gathered = parameter._module_info, parameter._unsharded_param
            wanted = parameter.sharded_param.requires_grad
            if gathered.requires_grad != wanted:
                gathered.requires_grad_(wanted)
            place.module._parameters[place.param_name] = gathered
            parameter.sharded_state = unsharded

    def to_sharded(self) -> None:
        """Put the shards back into their modules, and free the memory of all."""
        sharded = type(self._group[0].sharded_state).SHARDED
        for parameter in self._group:
            place = parameter._module_info
            place.module._parameters[place.param_name] = parameter.sharded_param
            storage = parameter.all_gather_outputs[0].untyped_storage()
            if storage.nbytes():
                storage.resize_(0)
            parameter.sharded_state = sharded


#: `id` of a group whose parameters are alike -> a reference to it.
_ALIKE: Final[dict[int, weakref.ref[Any]]] = {}


def as_one(call: Callable[..., Any], group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of an FSDPParamGroup, for which its parameters are one if that makes no difference."""
    known, after = _ALIKE.get(id(group)), group.post_forward_mesh_info
    if known is None or known() is not group or not (after is None or after is group.mesh_info):
        result = call(*args, **kwargs)
        _remember(group)
        return result
    parameters = group.fsdp_params
    if type(parameters[0]) is _AsOne:  # called once more inside
        return call(*args, **kwargs)
    group.fsdp_params = [_AsOne(parameters)]
    try:
        return call(*args, **kwargs)
    finally:
        group.fsdp_params = parameters


def _remember(group: Any) -> None:
    """Note a group that has been gathered once, so that all tensors are there, and whose parameters are alike."""
    shards = getattr(group.mesh_info, "shard_mesh_size", 1)
    if shards > 1 and all(map(_is_plain, group.fsdp_params)):
        _ALIKE[id(group)] = weakref.ref(group, partial(_forget, id(group)))


def _forget(key: int, reference: weakref.ref[Any]) -> None:
    if _ALIKE.get(key) is reference:
        del _ALIKE[key]


def _is_plain(parameter: Any) -> bool:
    """Whether an FSDPParam has been gathered, as it is, for one module, and along dimension 0."""
    from torch import nn

    place = parameter._module_info
    return (
        hasattr(parameter, "_unsharded_param")
        and len(parameter.all_gather_outputs) == 1
        and "_extensions_data" not in vars(parameter)
        and parameter.fsdp_placement.dim == 0
        and not place.shared_modules
        and type(place.module).__setattr__ is nn.Module.__setattr__
    )
