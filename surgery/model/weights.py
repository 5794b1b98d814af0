"""Assignment of checkpoint tensors to the parameters that they fill, checked before anything is read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import Checkpoint, Reader, TensorEntry
from surgery.errors import WeightsMismatchError
from surgery.model.concatenation import Watched
from surgery.model.fqn import split
from surgery.model.keys import Assignment, Group, Logical, group_keys
from surgery.model.tree import is_conv1d, tied_parameters, was_conv1d

__all__ = ["WeightPlan", "fill_buffers", "plan_weights", "untie_different"]

#: Names shown of a long list of missing or unexpected keys.
SHOWN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightPlan:
    """Tensors of a checkpoint that are loaded, in the model's order, and names of what is not, as in transformers.

    ignored: keys that have no place in the model, or whose parameter has another; and names in the index that no file
    holds. initialized: FQNs of buffers that no key fills, and that have their initial values. packed: FQNs of those
    parameters that are packed weights of the checkpoint, as they are.
    """

    assignments: tuple[Assignment, ...]
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    packed: frozenset[str] = frozenset()


def plan_weights(
    model: nn.Module, checkpoint: Checkpoint, *, device: torch.device, conversions: Sequence[Any] | None = None
) -> WeightPlan:
    """Match the tensors of `checkpoint` with the parameters and persistent buffers of `model`.

    `model` is on meta, before replacement. One of transformers is treated as `from_pretrained` does: names are
    converted by its own tables, what it has no use for is ignored, and persistent buffers that the checkpoint lacks are
    put on `device` with their initial values. Of any other, every name must match. Tied parameters that are stored
    with different values are untied; nothing is read but samples of those. conversions: as in `group_keys`.

    Raises `WeightsMismatchError` if a parameter would stay as it was initialized, a checkpoint key of a plain module
    has no place, or a shape or dtype cannot be right.
    """
    from transformers import PreTrainedModel

    index = checkpoint.index
    groups, unplaced, repeated = group_keys(model, checkpoint.weights(), conversions)
    logical = Logical.of(model)
    stored = {name: _finish(model, checkpoint, group, logical) for name, group in groups.items()}
    filled = {target for assignment in stored.values() for target in assignment.targets}
    missing = [first for first, aliases in tied_parameters(model).items() if filled.isdisjoint((first, *aliases))]
    initialized = fill_buffers(model, missing, device=device)
    missing = sorted(set(missing).difference(initialized))
    unexpected = [] if isinstance(model, PreTrainedModel) else unplaced
    if missing or unexpected:
        raise _mismatch(checkpoint, missing, unplaced)
    untie_different(model, stored, checkpoint)
    assignments = []
    for first, aliases in tied_parameters(model).items():
        names = [name for name in (first, *aliases) if name in stored]
        if names:
            assignments.append(_fill(first, names, stored))
    return WeightPlan(
        assignments=tuple(assignments),
        ignored=(*unplaced, *repeated, *index.ignored),
        initialized=initialized,
        packed=frozenset(
            each.targets[0] for each in assignments if each.converter is None and each.sources[0] in checkpoint.packed
        ),
    )


def _fill(first: str, names: Sequence[str], stored: Mapping[str, Assignment]) -> Assignment:
    """The assignment of the parameter that is met as `first`, and that is `stored` under some of its `names`."""
    name, *others = names
    chosen = stored[name]
    return replace(
        chosen,
        targets=tuple(first if target == name else target for target in chosen.targets),
        duplicates=tuple(source for other in others for source in stored[other].sources),
    )


def _mismatch(checkpoint: Checkpoint, missing: Sequence[str], unplaced: Sequence[str]) -> WeightsMismatchError:
    parts = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in (("parameters no tensor fills", missing), ("tensors that fit nowhere", unplaced))
        if names
    ]
    absent = [name for name in missing if name in checkpoint.index.ignored]
    hint = f" (its index lists {absent[0]}, but no file holds it)" if absent else ""
    return WeightsMismatchError(
        f"{checkpoint.path} does not hold the weights of this model{hint}: {'; '.join(parts)}. Check that the "
        "architecture in config.json is the one that wrote these weights",
        missing=missing,
        unexpected=unplaced,
    )


def _finish(model: nn.Module, checkpoint: Checkpoint, group: Group, logical: Logical) -> Assignment:
    """The assignment of `group`, after a dry run on meta that finds its targets and checks their shapes and dtypes."""
    assignment = Assignment(
        targets=(group.name,),
        sources=tuple(group.sources),
        converter=group.converter,
        logical=logical,
        patterns=tuple(group.patterns),
    )
    entries = [checkpoint.logical(name) for name in group.sources]
    for entry in entries:
        _check_known(group.name, entry)
    meta = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
    try:
        with Watched(meta) as watched:
            dry = assignment.convert(meta)
    except Exception as error:  # whatever operation fails, on tensors that do not belong together
        raise WeightsMismatchError(
            f"{group.name} cannot be made of {len(entries)} tensors of the checkpoint "
            f"({', '.join(group.sources[:SHOWN])}): {error}. Check that the architecture in config.json is the one "
            "that wrote these weights",
            path=entries[0].file,
            tensor=entries[0].name,
        ) from error
    for name, tensor in dry.items():
        _check_fits(model, name, tensor, entries, is_packed=entries[0].name in checkpoint.packed)
    orders = tuple(watched.order(tensor) for tensor in dry.values())
    return replace(
        assignment,
        targets=tuple(dry),
        dtypes=tuple(tensor.dtype for tensor in dry.values()),
        orders=orders if all(orders) else (),
    )


def _check_known(name: str, entry: TensorEntry) -> None:
    if entry.unknown is not None:
        raise WeightsMismatchError(
            f"{name} is to be filled by {entry.name} in {entry.file.name}, whose dtype {entry.unknown!r:.80} is not "
            f"supported: convert the tensor to F64, F32, F16 or BF16",
            path=entry.file,
            tensor=entry.name,
        )


def _check_fits(
    model: nn.Module, name: str, tensor: torch.Tensor, entries: Iterable[TensorEntry], *, is_packed: bool
) -> None:
    """Require equal shapes; floating goes into floating of any width, everything else into its own dtype."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    wanted = getattr(owner, leaf)
    entry = next(iter(entries))
    # What is packed is stored as the quantized module has it, `(out, in)`, else as Conv1D has it.
    turned = leaf == "weight" and (is_conv1d(owner) if is_packed else was_conv1d(owner))
    if tuple(tensor.shape[:: -1 if turned else 1]) != tuple(wanted.shape):
        raise WeightsMismatchError(
            f"{name} has shape {tuple(wanted.shape)} in the model, but {entry.file.name} holds {entry.name} with shape "
            f"{tuple(entry.shape)}: config.json and the weights are not of the same model",
            path=entry.file,
            tensor=entry.name,
        )
    castable = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if is_packed or tensor.dtype == wanted.dtype or (castable and wanted.dtype.is_floating_point):
        return
    raise WeightsMismatchError(
        f"{name} is {wanted.dtype} in the model, but {entry.file.name} holds {entry.name} as {tensor.dtype}: only "
        "float64, float32, float16 and bfloat16 weights can be loaded here",
        path=entry.file,
        tensor=entry.name,
    )


def fill_buffers(model: nn.Module, names: Iterable[str], *, device: torch.device) -> tuple[str, ...]:
    """Give the buffers of `names` the initial values of `model`, on `device`; returns the names that have one.

    Parameters are left out, and so are buffers whose initial value is random, or of which the model says nothing.
    """
    done = []
    for name in names:
        path, leaf = split(name)
        owner = model.get_submodule(path)
        value = _initial(model, path, leaf) if leaf in owner._buffers else None
        if value is not None:
            owner._buffers[leaf] = value.to(device)
            done.append(name)
    return tuple(done)


def _initial(model: nn.Module, path: str, leaf: str) -> torch.Tensor | None:
    """The value that initialization gives the buffer; None if that depends on chance, or on what was there before."""
    from transformers import PreTrainedModel

    steps = path.split(".") if path else []
    above = [model.get_submodule(".".join(steps[:length])) for length in range(len(steps) + 1)]
    initializer = next((module for module in reversed(above) if isinstance(module, PreTrainedModel)), None)
    if initializer is None:
        return None
    found: list[torch.Tensor] = []
    for trial in (0, 1):
        twin = copy.deepcopy(above[-1])
        twin._buffers[leaf] = torch.full_like(twin.get_buffer(leaf), trial, device="cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial)
            initializer._init_weights(twin)
        found.append(twin.get_buffer(leaf))
    return found[0] if torch.equal(*found) else None


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
