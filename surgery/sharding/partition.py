"""Partition of tensors: the rows that each rank reads, and keeps. Pure arithmetic, the same on every rank.

A tensor is divided along dimension 0 of the form in which it is stored, as FSDP2 divides it (`torch.chunk`). A packed
4-bit weight is `(n, 1)` there, so that its shards are contiguous ranges of the flat weight; quantization blocks are
independent; and a tensor in a safetensors file is a contiguous range of bytes. So a rank reads what it keeps, rounded
out to whole blocks, and nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["Form", "Grid", "Partition", "Slice", "chunk", "common"]


def chunk(rows: range, parts: int, part: int) -> range:
    """Part number `part` of `rows`, divided as `torch.chunk` does: equal parts, a smaller one, then empty ones."""
    size = -(-len(rows) // parts)
    return rows[part * size : (part + 1) * size]


def common(one: range, other: range) -> range:
    """The intersection of two ranges of step 1; an empty range inside of `other` if there is none."""
    start = min(max(one.start, other.start), other.stop)
    return range(start, max(min(one.stop, other.stop), start))


@dataclass(frozen=True, kw_only=True)
class Form:
    """The shape in which a tensor is stored and divided.

    rows: the size of dimension 0 (1 for a scalar). row: elements of the checkpoint that make a row; two per byte of
    a packed weight. numel: elements in the checkpoint; the last row may lack some. blocksize: elements that share one
    statistic, or None if it is not quantized. is_buffer: buffers are never sharded.
    is_packed: whether the checkpoint has rows as they are stored, so that no rank needs whole blocks.
    """

    rows: int
    row: int
    numel: int
    blocksize: int | None = None
    is_buffer: bool = False
    is_packed: bool = False

    def elements(self, rows: range) -> range:
        """Elements of the checkpoint behind `rows`."""
        return range(min(rows.start * self.row, self.numel), min(rows.stop * self.row, self.numel))

    @property
    def blocks(self) -> int:
        """Number of statistics."""
        return 0 if self.blocksize is None else -(-self.numel // self.blocksize)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One rank's part of one tensor.

    keeps: rows that the rank has once ranks that keep the same have exchanged what they read.
    reads: rows among them that this rank makes from the checkpoint, and no other rank.
    elements: what it reads for that, in elements of the checkpoint: `reads`, rounded out to whole blocks that are to be
        quantized.
    blocks: statistics that it computes, or reads, for all: of the blocks that begin in `reads`.
    """

    keeps: range
    reads: range
    elements: range
    blocks: range


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`replicas x shards` ranks, numbered row by row, as a device mesh `(replicate, shard)` numbers them."""

    replicas: int = 1
    shards: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.replicas * self.shards


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The division of all tensors of a model.

    grid: of sharded tensors. rank0_only: parameters that are not quantized are read and kept by rank 0 alone.
    """

    grid: Grid
    rank0_only: bool = False

    def slice(self, form: Form, rank: int) -> Slice:
        """The part of a tensor of `form` that `rank` reads and keeps."""
        return _slice(self, form, rank)

    def rows_of(self, rank: int, rows: int) -> range:
        """The rows that `rank` keeps of a sharded tensor of so many that no checkpoint fills."""
        return chunk(range(rows), self.grid.shards, rank % self.grid.shards)

    def grid_of(self, form: Form) -> Grid:
        """`grid`, but for buffers, which every rank keeps."""
        return Grid(replicas=self.grid.world_size) if form.is_buffer else self.grid

    def is_rank0s(self, form: Form) -> bool:
        """Whether rank 0 reads and keeps all of it, and the others nothing."""
        return self.rank0_only and form.blocksize is None and not form.is_buffer

    def capacity(self, form: Form, rank: int) -> int:
        """Rows that `rank` needs memory for: as many as the rank with most, because FSDP2 pads the others to that, and
        so many more that those who keep the same rows can gather equal parts.
        """
        if self.is_rank0s(form):
            return len(self.slice(form, rank).keeps)
        replicas = self.grid_of(form).replicas
        return -(-len(self.slice(form, 0).keeps) // replicas) * replicas

    def slices(self, form: Form) -> tuple[Slice, ...]:
        """The parts of all ranks, by rank."""
        return _slices(self, form)


@functools.cache
def _slices(partition: Partition, form: Form) -> tuple[Slice, ...]:
    return tuple(_slice(partition, form, rank) for rank in range(partition.grid.world_size))


@functools.cache
def _slice(partition: Partition, form: Form, rank: int) -> Slice:
    rows = range(form.rows)
    if partition.is_rank0s(form):
        kept = rows if rank == 0 else rows[:0]
        return Slice(keeps=kept, reads=kept, elements=form.elements(kept), blocks=range(0))
    grid = partition.grid_of(form)
    replica, shard = divmod(rank, grid.shards)
    keeps = chunk(rows, grid.shards, shard)  # of a buffer all, of which each rank reads a part all the same
    reads = chunk(keeps, grid.replicas, replica)
    elements = form.elements(reads)
    if form.blocksize is None or not elements:
        return Slice(keeps=keeps, reads=reads, elements=elements, blocks=range(0))
    size = form.blocksize
    first, last = elements.start // size, -(-elements.stop // size)
    rounded_out = elements if form.is_packed else range(first * size, min(last * size, form.numel))
    begin_here = range(-(-elements.start // size), last)
    return Slice(keeps=keeps, reads=reads, elements=rounded_out, blocks=begin_here)
