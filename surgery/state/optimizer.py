"""The state of an optimizer by names of parameters, which another sharding divides and groups otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from surgery.errors import ConfigError
from surgery.sharding.base import Trained
from surgery.state.pieces import SavedPiece

__all__ = ["Kept", "check_groups", "groups_of", "kept_of", "merge", "restore", "room_for"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The optimizer's state on this rank.

    pieces: tensors of one value for each element of a parameter. dtypes: theirs, by parameter and key. scalars: the
    rest that is one value, by parameter and key. opaque: all else, which no other sharding can divide, by `_layout`.
    """

    pieces: list[SavedPiece] = field(default_factory=list)
    dtypes: dict[str, dict[str, torch.dtype]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    opaque: dict[str, dict[str, Any]] = field(default_factory=dict)


def groups_of(optimizer: Optimizer, trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """The names of the trainable parameters in each group of them, and its options such as `lr`.

    Raises `ConfigError` if one is not of the model.
    """
    names = {each.parameter: [span.name for span in each.spans] for each in trained}
    found = []
    for number, group in enumerate(optimizer.param_groups):
        strange = [each for each in group["params"] if each.requires_grad and each not in names]
        if strange:
            raise ConfigError(
                f"expected an optimizer of parameters of the model, found {len(strange)} of other tensors in its group "
                f"{number}: make it after the model is sharded, from model.parameters()"
            )
        inside = sorted(name for each in group["params"] for name in names.get(each, ()))
        # Names that somebody has given are those of one sharding.
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        found.append({"names": inside, "options": options})
    return found


def kept_of(optimizer: Optimizer, trained: Iterable[Trained]) -> Kept:
    """The state of `optimizer` on this rank."""
    kept = Kept()
    for each in trained:
        # One whose elements are all on other ranks has counted no steps here.
        spans = [span for span in each.spans if span.numel]
        state: Mapping[str, Any] = optimizer.state.get(each.parameter, {})
        for key, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            if isinstance(local, torch.Tensor) and local.shape == each.memory.shape:
                flat = local.detach().reshape(-1)
                kept.pieces.extend(SavedPiece(path=_path(span.name, key), span=span, memory=flat) for span in spans)
                for span in spans:
                    kept.dtypes.setdefault(span.name, {})[key] = local.dtype
            elif isinstance(local, (int, float, bool)) or (isinstance(local, torch.Tensor) and local.dim() == 0):
                for span in spans:
                    kept.scalars.setdefault(span.name, {})[key] = _on_cpu(local)
            else:
                kept.opaque.setdefault(_layout(each), {})[key] = _on_cpu(local)
    return kept


def merge(by_rank: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Dtypes, or scalars, of all parameters; the lowest rank's where several have one."""
    merged: dict[str, dict[str, Any]] = {}
    for of_rank in by_rank:
        merged = {**of_rank, **merged}
    return merged


def check_groups(found: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` unless the optimizer has the groups of parameters that are `saved`."""
    if len(found) != len(saved):
        raise ConfigError(f"expected an optimizer with {len(saved)} groups of parameters, found {len(found)}")
    for number, (mine, theirs) in enumerate(zip(found, saved, strict=True)):
        differing = sorted(set(mine["names"]).symmetric_difference(theirs["names"]))
        if differing:
            raise ConfigError(
                f"expected {len(theirs['names'])} parameters in group {number} of the optimizer, as the state has, "
                f"found {len(mine['names'])}: {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''} "
                f"{'is' if len(differing) == 1 else 'are'} in one of them only"
            )


def room_for(trained: Sequence[Trained], saved: Kept) -> tuple[list[dict[str, Any]], list[SavedPiece]]:
    """The optimizer's state of each of `trained`, and the pieces of it that are still to be read.

    Raises `ConfigError` if what belongs together here has been trained apart, or the other way round.
    """
    states, pieces = [], []
    for each in trained:
        dtypes = _common(each, saved.dtypes)
        tensors = {
            key: torch.zeros(each.memory.shape, dtype=dtype, device=each.memory.device) for key, dtype in dtypes.items()
        }
        pieces += [
            SavedPiece(path=_path(span.name, key), span=span, memory=tensor.view(-1))
            for key, tensor in tensors.items()
            for span in each.spans
        ]
        opaque = saved.opaque.get(_layout(each), {})
        states.append({**tensors, **_common(each, saved.scalars), **opaque})
    known = {_layout(each) for each in trained}
    lost = [(key, name) for key, values in saved.opaque.items() if key not in known for name in values]
    if lost:
        raise ConfigError(
            f"the optimizer keeps {lost[0][1]!r} for {lost[0][0]}, which is neither one value nor one for each "
            "element, and cannot be divided otherwise: go on with the sharding and number of ranks that it was saved on"
        )
    return states, pieces


def restore(
    optimizer: Optimizer, trained: Sequence[Trained], states: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> None:
    """Give `optimizer` the `states`, which have been read, and the options of the saved `groups`."""
    numbers = itertools.count()
    ids = [[next(numbers) for _ in group["params"]] for group in optimizer.param_groups]
    places = {parameter: number for number, parameter in enumerate(_parameters(optimizer))}
    state = {
        places[each.parameter]: {
            key: each.like(value) if _is_local(value, each) else value for key, value in mine.items()
        }
        for each, mine in zip(trained, states, strict=True)
        # FSDP1 steps no original parameter whose elements are all on other ranks.
        if mine and each.parameter in places and each.parameter.numel()
    }
    saved = [{**group["options"], "params": inside} for group, inside in zip(groups, ids, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": saved})
    _undo_casts(optimizer, state)


def _undo_casts(optimizer: Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Bring back dtypes: torch 2.13 casts to that of the parameter, and bits of a float32 moment would be lost."""
    for number, parameter in enumerate(_parameters(optimizer)):
        for key, value in state.get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _common(each: Trained, saved: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The values saved for the parameters in `each`, which must be the same for all of them."""
    first, *others = each.spans
    values = saved.get(first.name, {})
    for span in others:
        if saved.get(span.name, {}) != values:
            raise ConfigError(
                f"{first.name} and {span.name} are one flat parameter here, but the state has trained them apart: "
                f"{saved.get(first.name, {})} and {saved.get(span.name, {})}. Use use_orig_params=True, or FSDP2"
            )
    return values


def _is_local(value: Any, each: Trained) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == each.memory.shape


def _layout(each: Trained) -> str:
    """The elements that this rank has in one tensor, as text."""
    return " and ".join(f"{span.name}[{span.start}:{span.start + span.numel}]" for span in each.spans)


def _path(name: str, key: str) -> tuple[str, ...]:
    return ("optimizer", "state", name, key)


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
