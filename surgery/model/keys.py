"""Checkpoint keys and the parameters that they name, matched by transformers' own tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from surgery.errors import WeightsMismatchError
from surgery.model.fqn import split

__all__ = ["Assignment", "Group", "Logical", "group_keys"]


@dataclass(kw_only=True, eq=False)
class Group:
    """The checkpoint keys of one parameter or persistent buffer.

    name: its FQN; of several that a converter fills, the first. converter: the `WeightConverter` that makes it of the
    sources, None if there is one source, taken as it is. patterns: the one of the converter's that each source matches.
    """

    name: str
    converter: Any = field(default=None, repr=False)
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


def group_keys(
    model: nn.Module, keys: Iterable[str], conversions: Sequence[Any] | None = None
) -> tuple[dict[str, Group], list[str], list[str]]:
    """Groups by name; keys that have no place in `model`; and further keys of a parameter that has its source already.

    As `convert_and_load_state_dict_in_model` of transformers does it: of several keys that are renamed alike, the first
    one counts. conversions: its `WeightRenaming` and `WeightConverter`; None takes those that it has for `model`.
    """
    from transformers.core_model_loading import dot_natural_key

    rename = _Renamer(model, conversions)
    groups: dict[str, Group] = {}
    unplaced: list[str] = []
    repeated: list[str] = []
    for key in _in_order(keys, dot_natural_key):
        name, converter, pattern = rename(key)
        if name not in rename.state:
            unplaced.append(key)
            continue
        group = groups.setdefault(name, Group(name=name, converter=converter))
        if group.sources and group.converter is None:
            repeated.append(key)
            continue
        group.sources.append(key)
        group.patterns.append(pattern or key)
    return groups, unplaced, repeated


def _in_order(keys: Iterable[str], sort_key: Callable[[str], Any]) -> list[str]:
    try:
        return sorted(keys, key=sort_key)
    except ValueError as error:  # of `int`, for a number of over 4,300 digits, or digits such as superscripts
        raise WeightsMismatchError(
            f"the names of the checkpoint's tensors have a number that is none: {error}"
        ) from error


class _Renamer:
    """Checkpoint key -> parameter name, by the conversion tables of transformers."""

    def __init__(self, model: nn.Module, conversions: Sequence[Any] | None) -> None:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        tables: Sequence[Any] = conversions or ()
        if conversions is None and isinstance(model, PreTrainedModel):
            tables = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in tables if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in tables if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.prefix = getattr(model, "base_model_prefix", None) or None
        self.state = dict(model.state_dict(keep_vars=True))

    def __call__(self, key: str) -> tuple[str, Any, str | None]:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return name, self.by_pattern.get(pattern) if pattern else None, pattern


@dataclass(frozen=True, kw_only=True, eq=False)
class Logical:
    """A model as converters see it: config, and parameters on meta in the shapes that they have unquantized."""

    config: Any
    parameters: Mapping[str, torch.Tensor]

    def get_parameter(self, name: str) -> torch.Tensor:
        """The parameter of that FQN. Raises `KeyError` if there is none."""
        return self.parameters[name]

    @classmethod
    def of(cls, model: nn.Module) -> Logical:
        """The view of `model`, before its layers are replaced."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(config=getattr(model, "config", None), parameters=parameters)


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Checkpoint tensors and the parameters that they fill.

    sources: checkpoint keys, each read once.
    targets: parameter or persistent-buffer FQNs. More than one only where `converter` splits.
    duplicates: further checkpoint keys that hold the same tensor again under the name of a tied parameter.
    converter: transformers' `WeightConverter` that turns the sources into the targets, or None: one source, as it is.
    logical: the model as converters know it; None without one.
    dtypes: of the targets as the checkpoint has them.
    orders: for each target the sources that it is, one whole one behind the other; empty where `converter` does more.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    duplicates: tuple[str, ...] = ()
    converter: Any = field(default=None, repr=False)
    logical: Logical | None = field(default=None, repr=False)
    patterns: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    orders: tuple[tuple[str, ...], ...] = ()

    def key_of(self, fqn: str) -> str:
        """The name of the target `fqn` in a checkpoint that has it alone: its own one, or where it has none, `fqn`."""
        source = self.sources[0]
        return source if self.converter is None and split(source)[1] == split(fqn)[1] else fqn

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`{target: tensor}` from `{source: tensor}`; meta tensors give the targets' shapes."""
        if self.converter is None:
            return {self.targets[0]: tensors[self.sources[0]]}
        converter = copy.deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.targets[0], source, pattern, tensors[source])
        assert self.logical is not None
        converted = converter.convert(self.targets[0], model=self.logical, config=self.logical.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def revert(
        self, tensors: Mapping[str, torch.Tensor], config: Any, conversions: Sequence[Any]
    ) -> dict[str, torch.Tensor]:
        """`{source: tensor}` from `{target: tensor}`, as `save_pretrained` makes it by all `conversions` of a model."""
        from transformers.core_model_loading import revert_weight_conversion

        view: Any = SimpleNamespace(
            config=config,
            get_parameter=None if self.logical is None else self.logical.get_parameter,
            _weight_conversions=list(conversions),
        )
        found: dict[str, torch.Tensor] = revert_weight_conversion(view, dict(tensors))
        return found
