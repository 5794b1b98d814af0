"""Which checkpoint tensors fill which parameters, decided and checked before anything is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import Index, TensorEntry
from surgery.errors import WeightsMismatchError
from surgery.walk import tied_parameters

__all__ = ["Assignment", "plan_weights"]

#: Names shown of a long list of missing or unexpected keys.
SHOWN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Checkpoint tensors and the parameters that they fill.

    sources: checkpoint keys, each read once.
    targets: parameter or persistent-buffer FQNs. More than one only where `converter` splits.
    duplicates: further checkpoint keys that hold the same tensor again under the name of a tied parameter.
    converter: transformers' `WeightConverter` that turns the sources into the targets, or None: one source, as it is.
    dtypes: of the targets as the checkpoint has them.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    duplicates: tuple[str, ...] = ()
    converter: Any = field(default=None, repr=False)
    patterns: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`{target: tensor}` from `{source: tensor}`; meta tensors give the targets' shapes."""
        if self.converter is None:
            return {self.targets[0]: tensors[self.sources[0]]}
        converter = copy.deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.targets[0], source, pattern, tensors[source])
        converted = converter.convert(self.targets[0])
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def plan_weights(model: nn.Module, index: Index) -> tuple[Assignment, ...]:
    """Match the tensors of `index` with the parameters and persistent buffers of `model` (on meta, before replacement).

    Names are converted by transformers' own tables where `model` is one of its models; elsewhere they must match.
    Raises `WeightsMismatchError` if a parameter would stay empty, a checkpoint key has no place, or a shape or dtype
    cannot be right. Reads nothing but the index.
    """
    tied = tied_parameters(model)
    first_name = {alias: first for first, aliases in tied.items() for alias in (first, *aliases)}
    groups, lost = _group(model, index, first_name)
    filled = [_finish(model, index, group) for group in groups]
    missing = sorted(set(tied) - {target for assignment in filled for target in assignment.targets})
    unexpected = [name for name in lost if not _may_be_left_out(model, name)]
    _check_complete(missing, unexpected, source=index.files[0].parent)
    order = {name: position for position, name in enumerate(tied)}
    return tuple(sorted(filled, key=lambda assignment: order[assignment.targets[0]]))


def _may_be_left_out(model: nn.Module, name: str) -> bool:
    """Whether the model's class declares that checkpoints hold `name` and that it has no use for it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _check_complete(missing: Sequence[str], unexpected: Sequence[str], *, source: object) -> None:
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in (("parameters no tensor fills", missing), ("tensors that fit nowhere", unexpected))
        if names
    ]
    raise WeightsMismatchError(
        f"{source} does not hold the weights of this model: {'; '.join(parts)}. Check that the architecture in "
        "config.json is the one that wrote these weights",
        missing=missing,
        unexpected=unexpected,
    )


@dataclass(eq=False)
class _Group:
    """The sources collected for one target while the index is walked."""

    target: str
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    converter: Any = None


def _group(model: nn.Module, index: Index, first_name: Mapping[str, str]) -> tuple[list[_Group], list[str]]:
    """Groups by target, and the keys that have none."""
    rename = _Renamer.of(model)
    groups: dict[str, _Group] = {}
    lost: list[str] = []
    for key in sorted(index, key=_natural):
        name, converter, pattern = rename(key)
        target = first_name.get(name)
        if target is None:
            lost.append(key)
            continue
        group = groups.setdefault(target, _Group(target=target, converter=converter))
        if group.sources and converter is None:
            group.duplicates.append(key)
            continue
        group.sources.append(key)
        group.patterns.append(pattern or key)
    return list(groups.values()), lost


def _natural(key: str) -> list[tuple[int, str]]:
    """Sort key under which `experts.10` follows `experts.9`: converters stack tensors in this order."""
    # By length and then by digit: `int` refuses a name of over 4,300 digits.
    return [(len(part), part) if part.isascii() and part.isdigit() else (-1, part) for part in key.split(".")]


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


def _finish(model: nn.Module, index: Index, group: _Group) -> Assignment:
    """The assignment of `group`, after a dry run on meta that finds its targets and checks their shapes and dtypes."""
    assignment = Assignment(
        targets=(group.target,),
        sources=tuple(group.sources),
        duplicates=tuple(group.duplicates),
        converter=group.converter,
        patterns=tuple(group.patterns),
    )
    entries = [index[name] for name in (*group.sources, *group.duplicates)]
    dry = assignment.convert({e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries})
    for name, tensor in dry.items():
        _check_fits(model, name, tensor, entries)
    for entry in entries[len(group.sources) :]:
        _check_fits(model, group.target, torch.empty(entry.shape, dtype=entry.dtype, device="meta"), [entry])
    return Assignment(
        targets=tuple(dry),
        sources=assignment.sources,
        duplicates=assignment.duplicates,
        converter=assignment.converter,
        patterns=assignment.patterns,
        dtypes=tuple(tensor.dtype for tensor in dry.values()),
    )


def _check_fits(model: nn.Module, name: str, tensor: torch.Tensor, entries: Iterable[TensorEntry]) -> None:
    """Shape must be equal; floating goes into floating of any width, everything else into its own dtype."""
    parent, _, leaf = name.rpartition(".")
    wanted = getattr(model.get_submodule(parent), leaf)
    entry = next(iter(entries))
    if tuple(tensor.shape) != tuple(wanted.shape):
        raise WeightsMismatchError(
            f"{name} has shape {tuple(wanted.shape)} in the model, but {entry.file.name} holds {entry.name} with shape "
            f"{tuple(entry.shape)}: config.json and the weights are not of the same model",
            path=entry.file,
            tensor=entry.name,
        )
    if tensor.dtype == wanted.dtype or (_castable(tensor.dtype) and wanted.dtype.is_floating_point):
        return
    raise WeightsMismatchError(
        f"{name} is {wanted.dtype} in the model, but {entry.file.name} holds {entry.name} as {tensor.dtype}: only "
        "float64, float32, float16 and bfloat16 weights can be loaded here",
        path=entry.file,
        tensor=entry.name,
    )


def _castable(dtype: torch.dtype) -> bool:
    return dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
