"""Tied parameters that a checkpoint stores under several names: untied if they differ, as in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.checkpoint import Checkpoint, Reader
from surgery.errors import WeightsMismatchError
from surgery.model.fqn import split
from surgery.model.tree import tied_parameters

if TYPE_CHECKING:
    from surgery.model.keys import Assignment

__all__ = ["untie_different"]

#: So many ranges are compared, of so many elements. Special and added tokens are in the first and the last.
SAMPLES, SAMPLE = 16, 1 << 12


def untie_different(model: nn.Module, stored: Mapping[str, Assignment], checkpoint: Checkpoint) -> None:
    """Untie parameters of `model`, on meta, that `checkpoint` stores with different values.

    That is what `PreTrainedModel.tie_weights` does while it loads: of parameters that are both there, and differ in the
    dtype of the model, none is dropped. They are compared by samples, the same here and on the hub; the loader compares
    all that it reads. Nothing is read if no tied parameter is stored twice. Raises `WeightsMismatchError` where untying
    would not give stock's model.
    """
    order = {name: number for number, name in enumerate(getattr(model, "all_tied_weights_keys", {}))}
    for first, aliases in tied_parameters(model).items():
        # The source of a tie before its targets, which are compared with it.
        names = sorted((first, *aliases), key=lambda name: order.get(name, -1))
        kept, *others = [name for name in names if name in stored] or [first]
        for name in others:
            if not _equal(checkpoint, stored[kept], stored[name], model.state_dict(keep_vars=True)[name].dtype):
                _untie(model, name, kept)


def _untie(model: nn.Module, name: str, kept: str) -> None:
    path, leaf = split(name)
    owner = model.get_submodule(path)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # Upstream has chosen what to quantize by then: a linear layer that is tied, or the head, stays in 16 bits.
    if name not in getattr(model, "all_tied_weights_keys", {}) or not (
        owner is head or isinstance(owner, nn.Embedding)
    ):
        raise WeightsMismatchError(
            f"{name} and {kept} differ in the checkpoint, but the model ties them: set tie_word_embeddings to false in "
            "config.json if they are two",
            tensor=name,
        )
    tied = owner.get_parameter(leaf)
    setattr(owner, leaf, nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad))
    model.all_tied_weights_keys.pop(name)  # type: ignore[operator, union-attr]  # a dictionary, upstream


def _equal(checkpoint: Checkpoint, one: Assignment, other: Assignment, dtype: torch.dtype) -> bool:
    with Reader(checkpoint.index) as reader:
        if one.converter is not None or other.converter is not None:
            whole = [a.convert({key: reader.read(key) for key in a.sources})[a.targets[0]] for a in (one, other)]
            return torch.equal(whole[0].to(dtype), whole[1].to(dtype))
        read = checkpoint.fetch or reader.read_range
        entries = [checkpoint.entry(a.sources[0]) for a in (one, other)]
        return all(
            torch.equal(*(read(entry, part.start, part.stop).to(dtype) for entry in entries))
            for part in _samples(entries[0].numel)
        )


def _samples(numel: int) -> Iterator[range]:
    """Ranges of elements from the first to the last; all of them if there are few."""
    if numel <= SAMPLES * SAMPLE:
        yield range(numel)
        return
    for number in range(SAMPLES):
        start = (numel - SAMPLE) * number // (SAMPLES - 1)
        yield range(start, start + SAMPLE)
