"""Fused experts taken apart again: the tensors of upstream's own names that a parameter is, one behind the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from surgery.model.concatenation import Watched
from surgery.model.keys import Assignment, Logical, group_keys
from surgery.writing.output import Planned

__all__ = ["Apart", "apart"]


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A flat parameter as the `tensors` of an output that it is, each whole, one behind the other."""

    tensors: tuple[Planned, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((planned.numel for planned in self.tensors), initial=0))

    def write(self, write: Callable[[str, torch.Tensor, int], None], values: torch.Tensor, start: int) -> None:
        """Hand `write` the elements `values` from flat element `start` on, as elements of the tensors that they are."""
        flat, done = values.reshape(-1), 0
        at = bisect_right(self._starts, start) - 1
        while done < flat.numel():
            planned, begin = self.tensors[at], start + done - self._starts[at]
            piece = flat[done : done + planned.numel - begin]
            write(planned.name, piece, begin)
            done, at = done + piece.numel(), at + 1


def apart(assignment: Assignment, fqn: str, meta: torch.Tensor, base: Any, conversions: Sequence[Any]) -> Apart | None:
    """The tensors that upstream makes the parameter `fqn` of, and writes of it, of which `assignment` has it.

    meta: of its shape, in the dtype of the output. base: the model, of transformers. conversions: by which it names and
    shapes a checkpoint. None where upstream's name is its own, or where it makes other tensors of it than whole ones,
    one behind the other.
    """
    try:
        made = assignment.revert({fqn: meta}, base.config, conversions)
        again = _assigned(fqn, meta, list(made), base, conversions)
        if again is None or set(again.sources) != set(made):
            return None
        sources = {name: torch.empty(each.shape, dtype=meta.dtype, device="meta") for name, each in made.items()}
        with Watched(sources) as watched:
            converted = again.convert(sources)
    except Exception:  # noqa: BLE001  # whatever an operation that cannot be turned around raises
        return None
    order = watched.order(converted[fqn]) if converted.keys() == {fqn} else ()
    found = tuple(Planned(name=name, dtype=meta.dtype, shape=tuple(made[name].shape)) for name in order)
    return Apart(tensors=found) if found else None


def _assigned(
    fqn: str, meta: torch.Tensor, names: Sequence[str], base: Any, conversions: Sequence[Any]
) -> Assignment | None:
    """The assignment that makes `fqn` of a checkpoint's `names`; None for one without a converter."""
    view: Any = SimpleNamespace(
        state_dict=lambda **_: {fqn: meta}, base_model_prefix=getattr(base, "base_model_prefix", None)
    )
    group = group_keys(view, names, conversions)[0].get(fqn)
    if group is None or group.converter is None:
        return None
    return Assignment(
        targets=(fqn,),
        sources=tuple(group.sources),
        converter=group.converter,
        logical=Logical(config=base.config, parameters={fqn: meta}),
        patterns=tuple(group.patterns),
    )
