"""The tensors that a checkpoint fills, and the memory that a rank fills with its part of each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import Index, PackedWeight, Segment
from surgery.model.fqn import split
from surgery.model.keys import Assignment
from surgery.quantizers.base import STATISTICS, Layout, QuantFormat, check_layout, check_run
from surgery.sharding.base import Devices
from surgery.sharding.partition import Form, Partition, Slice, common

__all__ = ["ShardBuffer", "ShardBuffers", "Target", "find_targets"]

NO_PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType({})
NONE_PACKED: Mapping[str, PackedWeight] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One parameter or persistent buffer of a model whose linear modules are replaced already, on meta.

    shape, dtype: as stored, so packed for a weight that is quantized. logical: that weight's own shape, `(out, in)`;
    layout: how it is packed; both None for what is not quantized. precision: the dtype in which it is quantized; None
    for the model's.
    segments: where the checkpoint has it: whole tensors, one behind the other, are its flat elements; or one is, of
    matrices that are transposed one by one. None if upstream's conversion does more, or the checkpoint holds it
    transposed as a whole, or packed for a module that is not quantized. All weights of an assignment have segments, or
    none.
    stored: the weight as the checkpoint has packed it, to be read and not quantized; else None.
    read_as: the dtype in which the checkpoint has it.
    places: the modules that hold it, and its name in each; several if it is tied. names: its FQNs at these places.
    quant: the format of its module, if it is packed. statistics_of: the FQN of the packed weight of which it is the
    state, as bytes; no checkpoint has it.
    """

    fqn: str
    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]
    shape: torch.Size
    dtype: torch.dtype
    form: Form
    assignment: Assignment
    read_as: torch.dtype
    segments: tuple[Segment, ...]
    logical: torch.Size | None = None
    layout: Layout | None = None
    stored: PackedWeight | None = None
    precision: torch.dtype | None = None
    is_transposed: bool = False
    quant: QuantFormat | None = None
    statistics_of: str | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it is bytes, in whatever dtype: a packed weight, or its statistics."""
        return self.is_quantized or self.statistics_of is not None

    @property
    def is_quantized(self) -> bool:
        """Whether what is stored is a packed weight."""
        return self.logical is not None

    def is_read_by_rank0(self, partition: Partition) -> bool:
        """Whether rank 0 alone reads it, and keeps it as it is read. Statistics are computed, as packed weights are."""
        return self.statistics_of is None and partition.is_rank0s(self.form)

    @property
    def module_fqn(self) -> str:
        """The FQN of the module under which it is met first."""
        return self.fqn.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        """Size of what is stored."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Size of what the checkpoint has of it."""
        if self.statistics_of is not None:
            return 0
        if self.stored is None:
            return self.form.numel * self.read_as.itemsize
        return self.nbytes + sum(entry.nbytes for entry in self.stored.side())


def find_targets(
    model: nn.Module,
    assignments: Iterable[Assignment],
    index: Index,
    formats: Sequence[QuantFormat],
    *,
    tied: Mapping[str, tuple[str, ...]],
    packed: Mapping[str, PackedWeight] = NONE_PACKED,
    transposed: frozenset[str] = frozenset(),
    precisions: Mapping[str, torch.dtype] = NO_PRECISIONS,
) -> tuple[Target, ...]:
    """The targets of `assignments`, in their order; behind a packed weight its statistics, where its module holds them.

    formats: of quantized modules. tied: first FQN of every parameter and persistent buffer -> aliases. packed: weights
    that the checkpoint has packed, by its names. transposed: FQNs of weights that it has as `(in, out)`. precisions:
    FQN of a weight -> the dtype in which it is quantized, if not the model's.
    Raises QuantizerError for a weight that is stored in another layout than the format says.
    """
    make = functools.partial(
        _target, model, index, formats, tied=tied, packed=packed, transposed=transposed, precisions=precisions
    )
    weights = (make(name, assignment) for assignment in assignments for name in assignment.targets)
    return tuple(each for weight in weights for each in (weight, *_statistics(weight)))


def _statistics(weight: Target) -> Iterator[Target]:
    """The statistics of a packed `weight`, if its module holds them as a parameter."""
    if not weight.is_quantized:
        return
    module, leaf = weight.places[0]
    held = module._parameters.get(leaf + STATISTICS)
    if held is not None:
        yield Target(
            fqn=weight.fqn + STATISTICS,
            names=tuple(name + STATISTICS for name in weight.names),
            places=tuple((module, leaf + STATISTICS) for module, leaf in weight.places),
            shape=held.shape,
            dtype=held.dtype,
            form=Form(rows=held.shape[0], row=1, numel=held.numel()),
            assignment=weight.assignment,
            read_as=held.dtype,
            segments=(),
            quant=weight.quant,
            statistics_of=weight.fqn,
        )


def _target(
    model: nn.Module,
    index: Index,
    formats: Sequence[QuantFormat],
    name: str,
    assignment: Assignment,
    *,
    tied: Mapping[str, tuple[str, ...]],
    packed: Mapping[str, PackedWeight],
    transposed: frozenset[str],
    precisions: Mapping[str, torch.dtype],
) -> Target:
    path, leaf = split(name)
    owner = model.get_submodule(path)
    tensor: torch.Tensor = getattr(owner, leaf)
    quant = next((each for each in formats if each.is_quantized(owner) and leaf in each.weight_names(owner)), None)
    logical, layout = (None, None) if quant is None else (quant.logical(owner, leaf), quant.layout(owner, leaf))
    if quant is not None and logical is not None and layout is not None:
        check_layout(quant, name, tensor, logical, layout)
    rows = tensor.shape[0] if tensor.shape else 1
    numel = (logical or tensor.shape).numel()
    # Packed rows are of whole bytes, so that all but the last are full.
    row = layout.values_per_byte * tensor.dtype.itemsize if layout is not None else numel // max(rows, 1)
    found = [packed[each] for each in assignment.sources if each in packed]
    stored = found[0] if found and quant is not None and assignment.converter is None else None
    # Where packed weights are not taken as they are, they are dequantized first.
    is_as_stored = not found and transposed.isdisjoint(assignment.targets)
    return Target(
        fqn=name,
        names=(name, *tied.get(name, ())),
        places=(
            (owner, leaf),
            *((model.get_submodule(split(place)[0]), split(place)[1]) for place in tied.get(name, ())),
        ),
        shape=tensor.shape,
        dtype=tensor.dtype,
        form=Form(
            rows=rows,
            row=row,
            numel=numel,
            blocksize=layout.blocksize if layout is not None else None,
            is_buffer=not isinstance(tensor, nn.Parameter),
            is_packed=stored is not None,
        ),
        assignment=assignment,
        read_as=assignment.dtypes[assignment.targets.index(name)] if stored is None else tensor.dtype,
        segments=(Segment(entry=stored.stored_as(tensor.dtype)),)
        if stored is not None
        else (_segments(assignment, name, index) if is_as_stored else ()),
        logical=logical,
        layout=layout,
        stored=stored,
        precision=precisions.get(name),
        is_transposed=name in transposed,
        quant=quant,
    )


def _segments(assignment: Assignment, name: str, index: Index) -> tuple[Segment, ...]:
    """The whole tensors that `name` is, one behind the other; none if it is not."""
    if assignment.converter is None:
        return (Segment(entry=index[assignment.sources[0]]),)
    if assignment.duplicates:
        return ()
    if assignment.is_turned:
        return (Segment(entry=index[assignment.sources[0]], is_turned=True),)
    if not assignment.orders:
        return ()
    return Segment.joined([index[source] for source in assignment.orders[assignment.targets.index(name)]])


#: What torch's CUDA allocator rounds sizes up to, in bytes.
ROUNDING = 512

#: What a buffer has before it is made.
NOTHING = torch.empty(0, device="cpu")


@dataclass(kw_only=True, eq=False)
class ShardBuffer:
    """This rank's part of one tensor.

    data: 1-D, in the dtype in which the target is stored: the rows of `slice.keeps`, and room for the rows that other
        ranks keep more of. statistics: float32, one for each of `slice.blocks`; None for what is not quantized.
    state: of the whole quantized weight, once all statistics are known; whole_state: the same with its tensors, until
        values were looked at, where those are a parameter.
    pieces: `(start, values)` in order, from flat element `start` of the tensor: read, and yet to be taken.
    converted: the whole tensor in the checkpoint's dtype, flat, on the CPU, on the one rank that has converted it.
    run: the partly assembled run that is to be quantized, on the compute device, or None.
    filled: number of elements taken so far.
    is_whole: whether `data` has become the whole tensor (on rank 0's CPU), or its shape on meta.
    """

    target: Target
    slice: Slice
    data: torch.Tensor = NOTHING
    statistics: torch.Tensor | None = None
    state: Any = None
    whole_state: Any = None
    pieces: Iterable[tuple[int, torch.Tensor]] = ()
    converted: torch.Tensor | None = None
    run: torch.Tensor | None = None
    filled: int = 0
    is_whole: bool = False

    @property
    def is_full(self) -> bool:
        """Whether all that this rank reads of it has been taken."""
        share, stored = self.slice, self.target.stored
        return self.filled == (len(share.elements) if stored is None else len(share.reads) + len(share.blocks))

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to be taken or exchanged."""
        return self.is_full and not self.pieces and not (self.target.is_quantized and self.state is None)

    @property
    def row(self) -> int:
        """Stored elements that make a row."""
        return self.target.shape[1:].numel()

    def tensor(self) -> torch.Tensor:
        """The rows that this rank keeps, in the target's shape but for dimension 0."""
        rows = self.target.form.rows if self.is_whole else len(self.slice.keeps)
        shape = (rows, *self.target.shape[1:]) if self.target.shape else ()
        return self.data[: rows * self.row].view(shape)

    def read_rows(self) -> torch.Tensor:
        """Flat: the rows that this rank alone has made."""
        start = (self.slice.reads.start - self.slice.keeps.start) * self.row
        return self.data[start : start + len(self.slice.reads) * self.row]


@dataclass(frozen=True, kw_only=True)
class ShardBuffers:
    """All shard buffers of this rank: how they are made and filled."""

    partition: Partition
    devices: Devices
    rank: int

    def reserve(self, targets: Iterable[Target]) -> None:
        """Get the GPU memory of all buffers from the driver at once, since one by one each would wait for it.

        Does nothing if there is less; the buffer that does not fit will say so.
        """
        device = self.devices.compute
        if device.type != "cuda" or self.partition.rank0_only:
            return
        size = sum(self._nbytes(target) for target in targets if self._made_on(target) == device)
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device=device)

    def _nbytes(self, target: Target) -> int:
        """Size of a buffer as the allocator rounds it up."""
        return -(-self._numel(target) * target.dtype.itemsize // ROUNDING) * ROUNDING

    def begin(self, target: Target) -> ShardBuffer:
        """An empty buffer, on the device where it is filled."""
        buffer = ShardBuffer(target=target, slice=self.partition.slice(target.form, self.rank))
        if not target.is_quantized or target.stored is not None or not buffer.slice.elements:
            self._make_room(buffer)
        return buffer

    def _make_room(self, buffer: ShardBuffer) -> None:
        """Memory for the rows that the rank keeps; for a quantized target for its statistics too."""
        target = buffer.target
        buffer.data = torch.empty(self._numel(target), dtype=target.dtype, device=self._made_on(target))
        if target.is_quantized:
            dtype = torch.float32 if target.stored is None else target.stored.absmax.dtype
            buffer.statistics = torch.empty(len(buffer.slice.blocks), dtype=dtype, device=self.devices.compute)

    def _numel(self, target: Target) -> int:
        return self.partition.capacity(target.form, self.rank) * target.shape[1:].numel()

    def _made_on(self, target: Target) -> torch.device:
        """The compute device, but for what rank 0 alone keeps as it is read."""
        if target.is_read_by_rank0(self.partition):
            return self.devices.data
        return self.devices.compute

    def fill(self, buffer: ShardBuffer, start: int, values: torch.Tensor) -> None:
        """Put the `values` of the checkpoint, 1-D, from element `start` of its tensor on, in their place.

        They may be on the CPU still (pinned, or not). For a quantized target they are whole blocks, come in order, and
        are quantized as soon as a run of them is there; if it is `stored`, they are its packed rows from row `start`
        on, and then its statistics from block `start` on.
        """
        if buffer.target.stored is not None:
            self._fill_stored(buffer, start, values)
            return
        buffer.filled += values.numel()
        if buffer.target.is_quantized:
            self._fill_runs(buffer, start - buffer.slice.elements.start, values)
            return
        first = start - buffer.target.form.elements(buffer.slice.keeps).start
        buffer.data[first : first + values.numel()].copy_(values, non_blocking=True)

    def _fill_stored(self, buffer: ShardBuffer, start: int, values: torch.Tensor) -> None:
        share, is_data = buffer.slice, buffer.filled < len(buffer.slice.reads)
        buffer.filled += values.numel()
        out = buffer.data if is_data else buffer.statistics
        first = start - (share.keeps.start if is_data else share.blocks.start)
        assert out is not None
        out[first : first + values.numel()].copy_(values, non_blocking=True)

    def _fill_runs(self, buffer: ShardBuffer, offset: int, values: torch.Tensor) -> None:
        """Quantize `values` run by run; `offset` counts from the first element that the rank reads, as runs do."""
        target = buffer.target
        assert target.layout is not None
        assert target.quant is not None
        size, done = target.layout.whole_blocks(target.quant.run_elements(self.devices.compute)), 0
        while done < values.numel():
            begin = (offset + done) // size * size
            run = range(begin, min(begin + size, len(buffer.slice.elements)))
            count = min(run.stop - offset - done, values.numel() - done)
            piece = values if count == values.numel() else values[done : done + count]
            whole = self._joined(buffer, run, offset + done, piece)
            if whole is not None:
                self._quantize(buffer, buffer.slice.elements.start + run.start, whole)
            done += count

    def _joined(self, buffer: ShardBuffer, run: range, offset: int, piece: torch.Tensor) -> torch.Tensor | None:
        """The whole `run` on the compute device, if `piece`, which begins at `offset`, is the last that it lacked."""
        if piece.numel() == len(run):
            return piece.to(self.devices.compute, non_blocking=True)
        if buffer.run is None:
            buffer.run = torch.empty(len(run), dtype=piece.dtype, device=self.devices.compute)
        at = offset - run.start
        buffer.run[at : at + piece.numel()].copy_(piece, non_blocking=True)
        if at + piece.numel() < len(run):
            return None
        whole, buffer.run = buffer.run, None
        return whole

    def _quantize(self, buffer: ShardBuffer, start: int, values: torch.Tensor) -> None:
        target, share = buffer.target, buffer.slice
        layout, quant = target.layout, target.quant
        assert layout is not None
        assert quant is not None
        packed, statistics = quant.quantize(values, layout, target.precision)
        check_run(quant, target.fqn, values.numel(), (packed, statistics), layout)
        nbytes = self._numel(target) * target.dtype.itemsize
        is_all = packed.numel() == nbytes and statistics.numel() == len(share.blocks)
        if is_all and values.numel() == len(share.elements) and start == target.form.elements(share.keeps).start:
            buffer.data, buffer.statistics = packed.view(target.dtype), statistics
            return
        if buffer.statistics is None:
            self._make_room(buffer)
        assert buffer.statistics is not None
        itemsize = buffer.data.element_size()
        out = buffer.data.view(torch.uint8)
        first_byte = start // layout.values_per_byte
        mine = common(
            range(first_byte, first_byte + packed.numel()),
            range(share.reads.start * itemsize, share.reads.stop * itemsize),
        )
        at = mine.start - share.keeps.start * itemsize
        out[at : at + len(mine)] = packed[mine.start - first_byte : mine.stop - first_byte]
        first_block = start // layout.blocksize
        owned = common(range(first_block, first_block + statistics.numel()), share.blocks)
        at = owned.start - share.blocks.start
        buffer.statistics[at : at + len(owned)] = statistics[owned.start - first_block : owned.stop - first_block]
