"""Checkpoint keys and the parameters that they name, matched by transformers' own tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.errors import WeightsMismatchError

__all__ = ["Group", "group_keys"]


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


def group_keys(model: nn.Module, keys: Iterable[str]) -> tuple[dict[str, Group], list[str], list[str]]:
    """Groups by name; keys that have no place in `model`; and further keys of a parameter that has its source already.

    As `convert_and_load_state_dict_in_model` of transformers does it: of several keys that are renamed alike, the first
    one counts.
    """
    from transformers.core_model_loading import dot_natural_key

    rename = _Renamer.of(model)
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

    def __init__(self, model: nn.Module, tables: Sequence[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.renamings = [entry for entry in tables if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in tables if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.prefix = getattr(model, "base_model_prefix", None) or None
        self.state = dict(model.state_dict(keep_vars=True))

    @classmethod
    def of(cls, model: nn.Module) -> _Renamer:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping

        return cls(model, get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else ())

    def __call__(self, key: str) -> tuple[str, Any, str | None]:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return name, self.by_pattern.get(pattern) if pattern else None, pattern
