"""The checkpoint that a model was filled from, and the place of each of its tensors, for whoever writes it again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.errors import ConfigError
from surgery.model.keys import Assignment, conversions_of
from surgery.passes.prepare import Prepared
from surgery.passes.setting import Setting
from surgery.passes.tensors import Target

__all__ = ["Loaded", "Origin", "origin_of", "remember"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """One parameter or persistent buffer of a base model as it was bound.

    names: its FQNs, several if it is tied. places: the modules that held it, and its name in each. shape: as stored.
    dtype: in which a checkpoint in 16 bits has it.
    """

    names: tuple[str, ...]
    places: tuple[tuple[weakref.ref[nn.Module], str], ...]
    shape: torch.Size
    dtype: torch.dtype
    assignment: Assignment = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """The checkpoint of a model. conversions: by which transformers names and shapes it; setting: the model's."""

    checkpoint: Checkpoint
    setting: Setting
    tensors: tuple[Loaded, ...]
    conversions: Sequence[Any]


_origins: weakref.WeakKeyDictionary[nn.Module, Origin] = weakref.WeakKeyDictionary()


def remember(prepared: Prepared, checkpoint: Checkpoint) -> None:
    """Keep for the model of `prepared`, as long as it lives, what it was filled from."""
    assignments = {target.assignment: _light(target.assignment) for target in prepared.targets}
    # Of packed stacks upstream has no converter, and of what they are unpacked.
    converts = any(assignment.converter is not None for assignment in assignments) or any(
        packed.settings.is_stack for packed in checkpoint.packed.values()
    )
    _origins[prepared.model] = Origin(
        checkpoint=checkpoint,
        setting=prepared.setting,
        tensors=tuple(
            _loaded(target, assignments[target.assignment], prepared.setting)
            for target in prepared.targets
            if target.statistics_of is None
        ),
        conversions=conversions_of(prepared.model, checkpoint.index.keys()) if converts else (),
    )


def origin_of(model: nn.Module) -> tuple[nn.Module, Origin]:
    """The base model in `model`, itself included, and what it was filled from. Raises `ConfigError`."""
    for module in model.modules():
        if module in _origins:
            return module, _origins[module]
    raise ConfigError(
        f"expected a model that surgery.qlora, surgery.fill or surgery.low_memory() has filled, found a "
        f"{type(model).__name__} whose checkpoint is not known; a copy of a model is none of those. Load it so, or "
        "save its adapter and merge that (surgery merge)"
    )


def _light(assignment: Assignment) -> Assignment:
    """The assignment without parameters on meta, where nothing is converted with them."""
    return assignment if assignment.converter is not None else replace(assignment, logical=None)


def _loaded(target: Target, assignment: Assignment, setting: Setting) -> Loaded:
    as_stored = any(_is_stored(setting, module, leaf) for module, leaf in target.places)
    as_stored = as_stored and target.dtype == setting.format.storage
    return Loaded(
        names=target.names,
        places=tuple((weakref.ref(module), leaf) for module, leaf in target.places),
        shape=target.shape,
        dtype=target.precision or (setting.dtype if as_stored else target.dtype),
        assignment=assignment,
    )


def _is_stored(setting: Setting, module: nn.Module, leaf: str) -> bool:
    """Whether a parameter is in the dtype of packed storage: a packed weight, and a bias too, but not of experts."""
    quant = next((each for each in setting.formats if each.is_quantized(module)), None)
    return quant is not None and (not quant.by_expert or leaf in quant.weight_names(module))
