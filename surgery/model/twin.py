"""Copies of module trees, without wrappers and with other parameters, which can be changed freely."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from surgery.model.fqn import join
from surgery.model.tree import unwrapped

__all__ = ["bare_copy", "twin_of"]

#: Hooks that would ask a wrapper for its part of a state dict, on one rank.
STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")

Parameters = Callable[[str, nn.Module], Mapping[str, torch.Tensor]]


def twin_of(
    model: nn.Module, parameters: Parameters, *, hollow: Collection[nn.Module] = ()
) -> dict[nn.Module, nn.Module]:
    """Copy the module tree of `model`; returns module -> copy, `model` itself first.

    A copy has the class, the attributes and the buffers of its module, and the parameters that `parameters` returns for
    its FQN (without wrapper segments) and itself. A module that is held twice has one copy. Modules of FSDP1, of
    activation checkpointing and of `torch.compile` are left out, and what they wrap is in their place. Those of
    `hollow` become empty modules.
    """
    made: dict[nn.Module, nn.Module] = {}
    _copy(model, "", parameters, frozenset(hollow), made)
    return made


def _copy(
    module: nn.Module, fqn: str, parameters: Parameters, hollow: frozenset[nn.Module], made: dict[nn.Module, nn.Module]
) -> nn.Module:
    module = unwrapped(module)
    if module in made:
        return made[module]
    if module in hollow:
        made[module] = nn.Module()
        return made[module]
    new = made[module] = bare_copy(module)
    new.__dict__.update({name: {} for name in STATE_HOOKS})
    new.__dict__["_parameters"] = dict(parameters(fqn, module))
    new.__dict__["_modules"] = {
        name: None if child is None else _copy(child, join(fqn, name), parameters, hollow, made)
        for name, child in module._modules.items()
    }
    return new


def bare_copy(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, which holds the same modules, parameters and buffers."""
    kind: type[nn.Module] = type(module)
    new = object.__new__(kind)  # FSDP2's own `__new__` would call `__init__`
    new.__dict__.update({name: _apart(value) for name, value in module.__dict__.items()})
    return new


def _apart(value: object) -> object:
    """A container of its own, so that a hook or a name that is added to the copy is not in the original too."""
    return value.copy() if isinstance(value, (dict, list, set)) else value
