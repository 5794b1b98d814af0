"""Plan of a merge: what becomes of every tensor, known before one is read: copied, merged, or taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from surgery.checkpoint import Checkpoint, PackedWeight, Reader, Request, Segment, TensorEntry
from surgery.errors import ConfigError
from surgery.model.fqn import join, split
from surgery.model.keys import Assignment, conversions_of, group_keys
from surgery.model.tree import is_conv1d, tied_parameters
from surgery.model.weights import WeightPlan
from surgery.quantizers.base import QuantFormat
from surgery.telemetry.report import Report
from surgery.writing.apart import Apart, apart
from surgery.writing.merge_adapters import Matched
from surgery.writing.merging import MergeSite, chunks
from surgery.writing.output import Output, Planned, finite
from surgery.writing.packing import Packer, StackPacker, planned_packed

__all__ = ["BaseModel", "Change", "Readers", "Work", "changes_of", "plan_work"]

#: Elements that are unpacked at a time, each with some 30 bytes of temporaries.
UNPACKED = 1 << 19

#: Bytes that are read into again and again, since pages that are new each time cost as much as reading.
ROOM = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Change:
    """Everything that adapters make of one parameter: another one in its place, layers of PEFT that change it, or both.

    leaf: its name in its module. tie: equal for two names of a tied parameter that change alike.
    """

    leaf: str = ""
    replaced: tuple[Matched, str] | None = None
    sites: tuple[MergeSite, ...] = ()
    tie: object = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """The base model, on meta, before it was adapted.

    tensors: parameters and persistent buffers by FQN. modules: FQNs, the first of each module; owners: modules by any
    of theirs. tied: first FQN of every tensor -> one FQN for each module that holds it. keys: of tied tensors, by FQN,
    in a checkpoint where they are not. ends: FQNs of embedding and head. conversions: with which transformers names and
    shapes a checkpoint.
    """

    model: Any
    tensors: Mapping[str, torch.Tensor]
    modules: Mapping[nn.Module, str]
    owners: Mapping[str, nn.Module]
    tied: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    ends: tuple[str | None, ...]
    weights: WeightPlan
    conversions: Sequence[Any]

    def owner(self, fqn: str) -> nn.Module:
        """The module of the base model that holds the tensor `fqn`."""
        return self.owners[split(fqn)[0]]

    @classmethod
    def of(cls, model: Any, weights: WeightPlan, checkpoint: Checkpoint) -> Self:
        """The view of `model`, which is to be adapted in place."""
        modules = {module: name for name, module in model.named_modules()}
        tied = {
            first: tuple(dict.fromkeys(_canonical(model, modules, name) for name in (first, *others)))
            for first, others in tied_parameters(model).items()
        }
        return cls(
            model=model,
            tensors=dict(model.state_dict(keep_vars=True)),
            modules=modules,
            owners=dict(model.named_modules(remove_duplicate=False)),
            tied=tied,
            keys=_tied_keys(model, checkpoint, [names for names in tied.values() if len(names) > 1]),
            ends=tuple(modules.get(getattr(model, f"get_{end}_embeddings")()) for end in ("input", "output")),
            weights=weights,
            conversions=conversions_of(model, checkpoint.index.keys()),
        )


def _canonical(model: nn.Module, modules: Mapping[nn.Module, str], name: str) -> str:
    path, leaf = split(name)
    return join(modules[model.get_submodule(path)], leaf)


def _tied_keys(model: nn.Module, checkpoint: Checkpoint, tied: Sequence[Sequence[str]]) -> dict[str, str]:
    """The key of each tied tensor: its own in `checkpoint`, or that of another, changed in the same way.

    What transformers would not read back has none.
    """
    if not tied:
        return {}
    groups = group_keys(model, checkpoint.weights())[0]
    found: dict[str, str] = {}
    for first, *others in tied:
        stored = next((groups[name].sources[0] for name in (first, *others) if name in groups), first)
        for name in (first, *others):
            own = groups[name].sources if name in groups else ()
            candidates = (*own, stored.replace(first, name), name)
            key = next((key for key in candidates if name in group_keys(model, [key])[0]), None)
            found |= {} if key is None else {name: key}
    return found


class Readers:
    """Readers of the base and of all adapters, to be used as a context manager; and the memory that is read into."""

    def __init__(self, checkpoint: Checkpoint, matched: Sequence[Matched], report: Report) -> None:
        self._stack = ExitStack()
        self._checkpoint = checkpoint
        self._memory = torch.empty(ROOM, dtype=torch.uint8)
        self.base = self._stack.enter_context(checkpoint.reader(on_read=report.count_bytes))
        self._adapters = {
            id(each): self._stack.enter_context(Reader(each.adapter.index, on_read=report.count_bytes))
            for each in matched
        }
        self.matched = tuple(matched)

    def of(self, matched: Matched) -> Reader:
        """The reader of that adapter."""
        return self._adapters[id(matched)]

    def read(self, entry: TensorEntry, stored: PackedWeight | None, start: int, stop: int) -> torch.Tensor:
        """Elements of a tensor of the base, unpacked: 1-D, in memory that the next call may use for others."""
        if stored is None:
            out = self._room(stop - start, entry.dtype)
            self.base.read_into(entry, out, start=start)
            return out
        out = self._room(stop - start, stored.settings.dtype)
        for first in range(start, stop, UNPACKED):
            last = min(first + UNPACKED, stop)
            out[first - start : last - start] = stored.dequantize(self.base.read_range, first, last)
        return out

    def read_segments(self, segments: tuple[Segment, ...], start: int, stop: int) -> torch.Tensor:
        """Elements of what tensors of the base are one behind the other, as `read`."""
        request, done = Request(segments=segments, start=start, stop=stop), 0
        out = self._room(stop - start, request.dtype)
        for entry, first, last in request.parts():
            self.base.read_into(entry, out[done : done + last - first], start=first)
            done += last - first
        return out

    def whole(self, name: str) -> torch.Tensor:
        """A tensor of the base, unpacked, in memory of its own."""
        entry = self._checkpoint.logical(name)
        if name not in self._checkpoint.packed:
            return self.base.read(entry)
        return self.read(entry, self._checkpoint.packed[name], 0, entry.numel).clone().view(entry.shape)

    def _room(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        size = numel * dtype.itemsize
        if size > ROOM:
            return torch.empty(numel, dtype=dtype)
        return self._memory[:size].view(dtype)

    def inputs(self, site: MergeSite) -> dict[str, torch.Tensor]:
        """The values of all adapters for `site`."""
        return {name: value for each in self.matched for name, value in each.inputs(site, self.of(each)).items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """Tensors of the output that one rank makes together. made: what they are called and stored as."""

    made: tuple[Planned, ...]

    @property
    def cost(self) -> int:
        """Bytes that it moves, roughly: by which work is divided."""
        return sum(planned.nbytes for planned in self.made)

    def run(self, readers: Readers, out: Output) -> None:
        """Read, merge, write. Raises `ExportError` for values that are not finite."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged(Work):
    """One tensor that is copied, cast, or merged, by ranges of its first dimension.

    source: where the base has it; of a stack of experts that it has in several tensors, one behind the other, what they
    would be in one, and these in segments. stored: the same if it is packed there, and is to be unpacked. dtype: in
    which it is merged. is_turned: whether a packed weight has the dimensions of this one, a `Conv1D`'s, the other way
    round. quant: in which format it is written; None for none. apart: the tensors that it is written as, if several.
    """

    source: TensorEntry
    dtype: torch.dtype
    segments: tuple[Segment, ...] = ()
    apart: Apart | None = None
    change: Change | None = None
    stored: PackedWeight | None = None
    is_turned: bool = False
    quant: QuantFormat | None = None

    @property
    def cost(self) -> int:
        """Its bytes, or several times those if they are computed with."""
        is_copied = self.change is None and self.stored is None and self.quant is None
        return self.source.numel * self.dtype.itemsize * (1 if is_copied else 4)

    def run(self, readers: Readers, out: Output) -> None:
        """Hold a few MiB of it, or all if it cannot be divided."""
        change = self.change or Change()
        entry, read = self.source, partial(readers.read, self.source, self.stored)
        if self.segments:
            read = partial(readers.read_segments, self.segments)
        if change.replaced is not None:
            matched, key = change.replaced
            entry = matched.adapter.index[key]
            read = partial(readers.of(matched).read_range, entry)
        unpacks = self.is_turned and self.stored is not None and change.replaced is None
        packs = self.is_turned and self.quant is not None
        divisible = not unpacks and not packs and all(site.is_divisible for site in change.sites)
        sink = self._sink(out, entry.shape[::-1] if packs and not unpacks else entry.shape)
        given = [(site, readers.inputs(site)) for site in change.sites]
        # What is not computed with is the base's own affair, such as a mask.
        is_plain = self.change is None and self.stored is None and self.quant is None
        is_copy = is_plain and entry.dtype == self.made[0].dtype == self.dtype
        row, size = math.prod(entry.shape[1:]), entry.shape[0] if entry.shape else 1
        for rows in chunks(entry.shape) if divisible else [range(size)]:
            part = read(rows.start * row, rows.stop * row).to(self.dtype).view(len(rows), *entry.shape[1:])
            part = part.t().contiguous() if unpacks else part
            for site, inputs in given:
                part = _merged(site, inputs, change.leaf, part, rows if divisible else None)
            part = part.t() if packs else part
            part = part if self.quant is not None else part.to(self.made[0].dtype)
            sink(part if is_copy else finite(part, self.made[0].name, rows if divisible else None), rows.start * row)
            del part

    def _sink(self, out: Output, shape: Sequence[int]) -> Callable[[torch.Tensor, int], None]:
        """A function that takes the values from an element on. shape: of what is packed."""
        if self.apart is not None:
            return partial(self.apart.write, out.write)
        if self.quant is None:
            return partial(out.write, self.made[0].name)
        packer = StackPacker if self.quant.by_expert else Packer
        return packer(self.quant, torch.Size(shape), self.made, out).add


def _merged(
    site: MergeSite, inputs: Mapping[str, torch.Tensor], leaf: str, part: torch.Tensor, rows: range | None
) -> torch.Tensor:
    """The parameter `leaf` after the merge. Raises `ExportError` for values that are not finite."""
    return finite(site.merge({leaf: part}, inputs, rows)[leaf], join(site.fqn, leaf), rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fused(Work):
    """Tensors that transformers makes one parameter of (experts, say): made into it, merged, and taken apart again.

    changes: by FQN of what `assignment` makes. base: whose conversions are turned around.
    """

    assignment: Assignment = field(repr=False)
    changes: Mapping[str, Change]
    base: BaseModel = field(repr=False)

    @property
    def cost(self) -> int:
        """Four times its bytes."""
        return 4 * super().cost

    def run(self, readers: Readers, out: Output) -> None:
        """Hold all of it: what is read, and what is made of it."""
        read = {name: readers.whole(name) for name in self.assignment.sources}
        tensors = self.assignment.convert(read)
        read.clear()
        tensors = {fqn: tensor.to(self.base.tensors[fqn].dtype) for fqn, tensor in tensors.items()}
        for fqn, change in self.changes.items():
            if change.replaced is not None:
                matched, key = change.replaced
                tensors[fqn] = readers.of(matched).read(key).to(tensors[fqn].dtype)
            for site in change.sites:
                _merge_in_place(site, readers.inputs(site), split(fqn)[1], tensors, fqn)
        parts = self.assignment.revert(tensors, self.base.model.config, self.base.conversions)
        tensors.clear()
        for planned in self.made:
            out.write(planned.name, finite(parts.pop(planned.name).to(planned.dtype), planned.name))


def _merge_in_place(
    site: MergeSite, inputs: Mapping[str, torch.Tensor], leaf: str, tensors: dict[str, torch.Tensor], fqn: str
) -> None:
    if not site.is_divisible:
        tensors[fqn] = _merged(site, inputs, leaf, tensors[fqn], None)
        return
    for rows in chunks(tensors[fqn].shape):
        part = tensors[fqn][rows.start : rows.stop]
        part.copy_(_merged(site, inputs, leaf, part, rows))


def _check_taken_apart(base: BaseModel, assignment: Assignment, checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` unless, on meta, the names and shapes of the base come out."""
    meta = {name: torch.empty(checkpoint.logical(name).shape, device="meta") for name in assignment.sources}
    try:
        made = assignment.revert(assignment.convert(meta), base.model.config, base.conversions)
        found = {name: tuple(tensor.shape) for name, tensor in made.items()}
        problem = f"found {len(found)} others" if found != {n: tuple(t.shape) for n, t in meta.items()} else None
    except Exception as error:  # noqa: BLE001  # whatever an operation that cannot be turned around raises
        problem = f"found {type(error).__name__}: {error}"
    if problem is not None:
        raise ConfigError(
            f"{', '.join(assignment.targets)}: transformers makes it of {len(assignment.sources)} tensors of this base "
            f"({assignment.sources[0]}, ...), expected it to make those of it again, {problem}: merge with PEFT's "
            "merge_and_unload"
        )


def changes_of(base: BaseModel, matched: Sequence[Matched], sites: Sequence[MergeSite]) -> dict[str, Change]:
    """Changes in the base, by FQN. Raises `ConfigError` where two adapters cannot be brought together."""
    found: dict[str, Change] = {}
    for each in matched:
        for fqn, key in each.replaced.items():
            if fqn in found:
                raise ConfigError(
                    f"{fqn} is saved whole in {found[fqn].replaced[0].adapter.path} and in {each.adapter.path}: merge "  # type: ignore[index]
                    "one of them"
                )
            found[fqn] = Change(leaf=split(fqn)[1], replaced=(each, key), tie=key)
    ends = [site for site in sites if site.fqn in base.ends]
    alike = len(ends) == 2 and _are_alike(ends, matched)
    for site in sites:
        _check_tokens(site)
        tie = "ends" if alike and site in ends else frozenset(map(id, site.inputs.values()))
        for leaf in site.changes:
            before = found.get(join(site.fqn, leaf), Change(leaf=leaf))
            found[join(site.fqn, leaf)] = replace(before, sites=(*before.sites, site), tie=(before.tie, tie))
    return found


def _are_alike(ends: Sequence[MergeSite], matched: Sequence[Matched]) -> bool:
    """Whether the adapters of embedding and head are each other's transposed, as `ensure_weight_tying` makes them.

    Their values are compared: PEFT unties them when it casts adapters (peft 0.21.2).
    """
    with ExitStack() as stack:
        readers = [(each, stack.enter_context(Reader(each.adapter.index))) for each in matched]
        found = [{k: v for each, reader in readers for k, v in each.inputs(site, reader).items()} for site in ends]
    embedding, head = sorted(found, key=lambda inputs: not any(key.startswith("lora_embedding") for key in inputs))
    pairs = {
        key.replace("lora_embedding_A", "lora_B") + ".weight"
        if key.startswith("lora_embedding_A.")
        else key.replace("lora_embedding_B", "lora_A") + ".weight": value.t()
        for key, value in embedding.items()
        if key.startswith("lora_embedding")
    }
    scalings = [site.layer.scaling for site in ends if hasattr(site.layer, "scaling")]
    same = pairs.keys() == head.keys() and len(pairs) == len(embedding) and scalings[:1] == scalings[1:]
    return same and all(torch.equal(value, head[key]) for key, value in pairs.items())


def _check_tokens(site: MergeSite) -> None:
    """Refuse two adapters that have trained the same token."""
    indices = [set(site.layer.token_indices[name]) for name in site.adapters if hasattr(site.layer, "token_indices")]
    for number, one in enumerate(indices):
        for other in indices[:number]:
            if one & other:
                raise ConfigError(
                    f"{site.fqn}: expected adapters that have trained different tokens, found token {min(one & other)} "
                    "in two of them: merge one of them"
                )


def plan_work(
    base: BaseModel,
    checkpoint: Checkpoint,
    changes: Mapping[str, Change],
    *,
    cast: bool,
    quantized: Mapping[str, QuantFormat],
) -> tuple[tuple[Work, ...], bool]:
    """The work on all tensors of `checkpoint`, in the order of its files; and whether embedding and head are untied.

    cast: whether tensors that nothing changes take the dtype of the model; they stay as they are otherwise. quantized:
    FQNs of weights that are to be packed, and in which format; those that are packed and stay as they are, are copied.
    A tied tensor of which one name changes, or both differently, is written for each of them.
    """
    works: dict[str, list[Work]] = {name: [] for name in checkpoint.index}
    one = partial(_one, base, checkpoint, cast=cast)
    untied = False
    for assignment in base.weights.assignments:
        fqn = assignment.targets[0]
        names = base.tied.get(fqn, ())
        mine = {name: changes.get(name) for name in (*names, *assignment.targets)}
        sources = (*assignment.sources, *assignment.duplicates)
        form = next((quantized[target] for target in assignment.targets if target in quantized), None)
        changed = {name: change for name, change in mine.items() if change is not None}
        if (changed or form is not None) and _is_divided(base, assignment, changed):
            change = changed.get(fqn)
            works[sources[0]] = [_stack(base, checkpoint, assignment, change, quant=form)]
            continue
        if form is not None and assignment.converter is not None:
            raise ConfigError(
                f"{fqn} is to be quantized, and transformers makes it of {len(sources)} tensors of this base: merge it "
                "into 16 bits (--dtype bf16), and quantize that (surgery quantize)"
            )
        if assignment.converter is not None and any(mine.values()):
            _check_taken_apart(base, assignment, checkpoint)
            tensor = base.tensors[fqn]
            made = tuple(_planned(n, checkpoint.logical(n), tensor.dtype) for n in assignment.sources)
            works[sources[0]] = [Fused(made=made, assignment=assignment, changes=changed, base=base)]
        elif len({change.tie if change is not None else None for change in mine.values()}) == 1:
            change = next(iter(mine.values()))
            works |= {name: one(fqn, name, change, quant=form) for name in sources}
        else:
            untied = True
            works[sources[0]] = [
                work
                for name, change in mine.items()
                for work in one(fqn, sources[0], change, quant=form, key=_untied_key(base, name))
            ]
    rest = [name for name in base.weights.ignored if name in checkpoint.index]
    works |= {name: [_copied(checkpoint.entry(name))] for name in rest}
    return tuple(work for each in works.values() for work in each), untied


def _is_divided(base: BaseModel, assignment: Assignment, changed: Mapping[str, Change]) -> bool:
    """Whether a fused parameter is made of whole tensors, and none of its changes needs all of it."""
    is_whole = (
        assignment.converter is not None
        and bool(assignment.orders)
        and len(assignment.targets) == 1
        and not assignment.duplicates
    )
    if not is_whole or len(base.tensors[assignment.targets[0]].shape) != 3:
        return False
    return all(
        change.replaced is None and all(site.is_divisible for site in change.sites) for change in changed.values()
    )


def _stack(
    base: BaseModel, checkpoint: Checkpoint, assignment: Assignment, change: Change | None, *, quant: QuantFormat | None
) -> Merged:
    """The work on a stack of experts, which the base has in several tensors: merged, packed, or both."""
    fqn, names = assignment.targets[0], assignment.orders[0]
    dtype, shape = base.tensors[fqn].dtype, tuple(base.tensors[fqn].shape)
    entries = [checkpoint.entry(name) for name in names]
    pieces = Apart(tensors=tuple(_planned(entry.name, entry, dtype) for entry in entries))
    return Merged(
        made=pieces.tensors if quant is None else planned_packed(fqn, quant, shape, quant.storage),
        source=replace(entries[0], name=fqn, shape=shape),
        segments=Segment.joined(entries),
        dtype=dtype,
        change=change,
        quant=quant,
        apart=pieces if quant is None else None,
    )


def _untied_key(base: BaseModel, name: str) -> str:
    """The key of an embedding or a head that is no longer tied. Raises `ConfigError` where another tensor is."""
    if name in base.keys and split(name)[0] in base.ends:
        return base.keys[name]
    raise ConfigError(
        f"{name} is tied in this base, and the adapter changes one place of it and not the other: expected that of an "
        "embedding and a head, which can be untied. Merge with PEFT's merge_and_unload"
    )


def _one(
    base: BaseModel,
    checkpoint: Checkpoint,
    fqn: str,
    source: str,
    change: Change | None,
    *,
    quant: QuantFormat | None,
    cast: bool,
    key: str | None = None,
) -> list[Work]:
    """The work on the tensor `source` of the base, which fills `fqn`, and on what is beside a packed one."""
    stored, entry, tensor = checkpoint.packed.get(source), checkpoint.logical(source), base.tensors[fqn]
    if change is None and stored is not None and quant is not None:
        return [_copied(each) for each in (stored.data, *stored.side())]
    is_made = cast or change is not None or stored is not None or quant is not None
    is_float = entry.unknown is None and entry.dtype.is_floating_point
    dtype = tensor.dtype if is_made and is_float else entry.dtype
    is_conv = split(fqn)[1] == "weight" and is_conv1d(base.owner(fqn))
    name, shape = key or source, entry.shape[:: -1 if is_conv and stored is not None else 1]
    made: tuple[Planned, ...] = (Planned(name=name, dtype=dtype, shape=shape),)
    pieces = None
    if quant is not None:
        made = planned_packed(name, quant, shape, stored.data.dtype if stored is not None else quant.storage)
    elif stored is not None and stored.settings.is_stack:
        assignment = next(each for each in base.weights.assignments if fqn in each.targets)
        pieces = apart(assignment, fqn, torch.empty(shape, dtype=dtype, device="meta"), base.model, base.conversions)
        made = made if pieces is None else pieces.tensors
    return [
        Merged(
            made=made,
            apart=pieces,
            source=entry,
            dtype=dtype,
            change=change,
            stored=stored,
            is_turned=is_conv,
            quant=quant,
        )
    ]


def _copied(entry: TensorEntry) -> Merged:
    return Merged(made=(_planned(entry.name, entry, entry.dtype),), source=entry, dtype=entry.dtype)


def _planned(name: str, entry: TensorEntry, dtype: torch.dtype) -> Planned:
    return Planned(name=name, dtype=dtype, shape=entry.shape)
