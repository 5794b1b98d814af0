"""`torch.fsdp2-alike-parameters`: FSDP2 works out once how parameters that are alike are sharded on meta."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

import model_surgery_patches as patches

__all__ = ["follow_the_first"]

#: What each `FSDPParam` has of its own; in all else those of parameters that are alike are the same.
OWN: Final = frozenset({
    "_module_info", "_post_load_hook_handle", "_sharded_param_data", "mesh_info", "post_forward_mesh_info",
    "sharded_param",
})  # fmt: skip

#: A number that not all releases give a parameter.
NUMBER: Final = "_orig_param_uid"


@dataclass(kw_only=True, eq=False)
class Kind:
    """The part of `FSDPParam`s that is the same for parameters that are alike. is_proven: by the second one."""

    names: frozenset[str]
    shared: dict[str, Any]
    is_proven: bool | None = None


_kinds: WeakValueDictionary[object, Kind] = WeakValueDictionary()
_first: WeakKeyDictionary[object, Kind] = WeakKeyDictionary()  # as long as the first one is there


def works_out_each() -> bool:
    """Whether FSDP2 works out for each parameter by itself how it is sharded."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    return "_init_sharded_param" in inspect.unwrap(FSDPParam.__init__).__code__.co_names


def check_follows_the_first() -> None:
    """Raise RuntimeError if a third parameter is not made after the first, or one that is different is."""

    class Specimen:
        def to_sharded_dtensor(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        def _setattr_on_modules(self, param: torch.Tensor) -> None:
            vars(self)["set"] = param

    def stock(instance: Any, _param: object, info: Any, *_args: object) -> None:
        vars(instance).update(dict.fromkeys(OWN, info), seen=[], sharded_size=(1,), padded_sharded_param_size=(1,))
        made.append(instance)

    made: list[object] = []
    device = object()  # so that this is a kind of its own
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in (2, 2, 2, 3)]
    every = [Specimen() for _ in parameters]
    for instance, parameter in zip(every, parameters, strict=True):
        given = (parameter, _Info(), None, None, device, None, None, None)
        follow_the_first(functools.partial(stock, instance), instance, given, {})
    third = vars(every[2])
    if made != [every[0], every[1], every[3]] or third["set"] is not third["sharded_param"] or third["seen"] != []:
        raise RuntimeError("expected the third parameter of a kind, and no other, to be made after the first")


class _Info:
    """A stand-in for where a parameter is, and for the module there."""

    @property
    def module(self) -> _Info:
        return self

    def register_load_state_dict_post_hook(self, hook: object) -> object:
        return hook


@patches.register(
    "torch.fsdp2-alike-parameters",
    target="torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.__init__",
    reason="FSDP2 works out anew, in Python, how each of hundreds of parameters of the same shape is sharded on meta",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param.py",
    requires={"torch": ">=2.11,<2.14"},
    signature=(
        "(self, param, module_info, mesh_info, post_forward_mesh_info, device, shard_placement_fn, mp_policy, "
        "offload_policy)"
    ),
    fingerprint=("62643c98d0920c36", "065e71f164d6b58e"),  # 2.11, 2.13
    on_unknown="skip",
    on_drift="skip",
    probe=works_out_each,
    verify=check_follows_the_first,
)
def follow_the_first(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Make the third and later `FSDPParam`s of a kind after the first, if the second was like it in all but `OWN`.

    Plain parameters on meta alone, without a placement of their own.
    """
    key = _key(args) if len(args) == 8 and not kwargs else None
    known = None if key is None else _kinds.get(key)
    if known is not None and known.is_proven:
        _fill(instance, known, args)
        return
    wrapped(*args, **kwargs)
    if known is not None and known.is_proven is None:
        known.is_proven = _is_like(known, vars(instance))
    elif key is not None and known is None:
        shared = {name: value for name, value in vars(instance).items() if name not in OWN and name != NUMBER}
        _kinds[key] = _first[instance] = Kind(names=frozenset(vars(instance)), shared=shared)


def _key(given: tuple[Any, ...]) -> object | None:
    """All that an `FSDPParam` is worked out from; None for a parameter that is left to upstream."""
    param, _, mesh, after, device, placement, precision, offload = given

    if type(param) is not nn.Parameter or not param.is_meta or placement is not None:
        return None
    settings = tuple((type(each), *vars(each).items()) if hasattr(each, "__dict__") else each for each in (
        mesh, after, precision, offload
    ))  # fmt: skip
    key = (tuple(param.shape), param.stride(), param.dtype, param.requires_grad, device, settings)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _is_like(known: Kind, made: dict[str, Any]) -> bool:
    if made.keys() != known.names or not known.names >= OWN:
        return False
    return all(type(made[name]) is type(value) and _equal(made[name], value) for name, value in known.shared.items())


def _equal(one: object, other: object) -> bool:
    return one is other or (type(one).__eq__ is not object.__eq__ and (one == other) is True)


def _fill(instance: Any, known: Kind, given: tuple[Any, ...]) -> None:
    """Do to `instance` what its `__init__` does."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    param, info, mesh, after, *_ = given
    vars(instance).update({name: [*each] if type(each) is list else each for name, each in known.shared.items()})
    instance._module_info, instance.mesh_info, instance.post_forward_mesh_info = info, mesh, after
    if NUMBER in known.names:
        instance._orig_param_uid = _fsdp_param._get_orig_param_uid(param)
    padded = torch.empty(instance.padded_sharded_param_size, dtype=param.dtype, device="meta")
    instance._sharded_param_data = padded.view(-1)
    sharded = instance.to_sharded_dtensor(padded.narrow(0, 0, instance.sharded_size[0]))
    sharded.requires_grad_(param.requires_grad)
    sharded._is_param = True  # as nn.Parameter does, which makes a second DTensor of the first one
    instance.sharded_param = sharded
    instance._setattr_on_modules(sharded)
    instance._post_load_hook_handle = info.module.register_load_state_dict_post_hook(
        lambda *_args, **_kwargs: instance.reset_sharded_param()
    )
