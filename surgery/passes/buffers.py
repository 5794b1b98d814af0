"""What a rank holds of the tensors of a model while they are loaded: parts that fill up, then wholes or shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.passes.targets import Target
from surgery.quantizers.base import Quantizer, check_run, check_runs
from surgery.sharding.devices import Devices
from surgery.sharding.partition import Partition, Slice

__all__ = ["ShardBuffer", "ShardBuffers"]

#: What torch's CUDA allocator rounds sizes up to, in bytes.
ROUNDING = 512

#: What a part has before it is made.
NOTHING = torch.empty(0, device="cpu")


@dataclass(kw_only=True, eq=False)
class ShardBuffer:
    """This rank's part of one target.

    data: 1-D, in the dtype in which the target is stored: the rows of `slice.keeps`, and room for the rows that other
        ranks keep more of. statistics: float32, one for each of `slice.blocks`; None for what is not quantized.
    state: what belongs to the packed data of the whole weight, once all statistics are known.
    converted: the whole tensor in the checkpoint's dtype, flat, on the CPU, on the one rank that has converted it.
    run: what has come of a run that is to be quantized, on the compute device, while it is not complete.
    is_whole: whether `data` has become the whole tensor (on rank 0's CPU), or its shape on meta.
    """

    target: Target
    slice: Slice
    data: torch.Tensor = NOTHING
    statistics: torch.Tensor | None = None
    state: Any = None
    converted: torch.Tensor | None = None
    run: torch.Tensor | None = None
    is_whole: bool = False

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
    """All parts of this rank, by the FQN of their target. Batch passes fill them; `install` takes them."""

    quantizer: Quantizer = field(repr=False)
    division: Partition
    residence: Devices
    rank: int
    found: dict[str, ShardBuffer] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_runs(self.quantizer, self.residence.compute_device)

    def reserve(self, targets: Iterable[Target]) -> None:
        """Have the GPU's memory for all parts in torch's allocator, at once: one by one they would each wait for the
        driver. Where it is not to be had, nothing happens; the part that does not fit will say so.
        """
        device = self.residence.compute_device
        if device.type != "cuda" or self.division.rank0_only:
            return
        size = sum(self._nbytes(target) for target in targets if self._made_on(target) == device)
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device=device)

    def _nbytes(self, target: Target) -> int:
        """Of a part, as the allocator rounds it up."""
        return -(-self._numel(target) * target.dtype.itemsize // ROUNDING) * ROUNDING

    def begin(self, target: Target) -> ShardBuffer:
        """An empty part, on the device where it is made."""
        part = ShardBuffer(target=target, slice=self.division.slice(target.form, self.rank))
        self.found[target.fqn] = part
        if not target.is_quantized or not part.slice.elements:
            self._make_room(part)
        return part

    def _make_room(self, part: ShardBuffer) -> None:
        """Memory for the rows that the rank keeps; for a quantized target for its statistics too."""
        target = part.target
        part.data = torch.empty(self._numel(target), dtype=target.dtype, device=self._made_on(target))
        if target.is_quantized:
            device = self.residence.compute_device
            part.statistics = torch.empty(len(part.slice.blocks), dtype=torch.float32, device=device)

    def _numel(self, target: Target) -> int:
        return self.division.capacity(target.form, self.rank) * target.shape[1:].numel()

    def _made_on(self, target: Target) -> torch.device:
        """The compute device, but for what rank 0 alone keeps as it is read."""
        if self.division.is_rank0s(target.form):
            return self.residence.data_device
        return self.residence.compute_device

    def of(self, targets: Iterable[Target]) -> list[ShardBuffer]:
        """The parts of `targets`."""
        return [self.found[target.fqn] for target in targets]

    def fill(self, part: ShardBuffer, start: int, values: torch.Tensor) -> None:
        """Put the `values` of the checkpoint, 1-D, from element `start` of its tensor on, in their place.

        They may be on the CPU still (pinned, or not). For a quantized target they are whole blocks, come in order, and
        are quantized as soon as a run of them is there.
        """
        if part.target.is_quantized:
            self._fill_runs(part, start - part.slice.elements.start, values)
            return
        first = start - part.target.form.elements(part.slice.keeps).start
        part.data[first : first + values.numel()].copy_(values, non_blocking=True)

    def _fill_runs(self, part: ShardBuffer, offset: int, values: torch.Tensor) -> None:
        """`offset` counts from the first element that the rank reads, as runs do."""
        size, done = self.quantizer.run_elements(self.residence.compute_device), 0
        while done < values.numel():
            begin = (offset + done) // size * size
            run = range(begin, min(begin + size, len(part.slice.elements)))
            count = min(run.stop - offset - done, values.numel() - done)
            piece = values if count == values.numel() else values[done : done + count]
            whole = self._joined(part, run, offset + done, piece)
            if whole is not None:
                self._quantize(part, part.slice.elements.start + run.start, whole)
            done += count

    def _joined(self, part: ShardBuffer, run: range, offset: int, piece: torch.Tensor) -> torch.Tensor | None:
        """The whole `run` on the compute device, if `piece`, which begins at `offset`, is the last that it lacked."""
        if piece.numel() == len(run):
            return piece.to(self.residence.compute_device, non_blocking=True)
        if part.run is None:
            part.run = torch.empty(len(run), dtype=piece.dtype, device=self.residence.compute_device)
        at = offset - run.start
        part.run[at : at + piece.numel()].copy_(piece, non_blocking=True)
        if at + piece.numel() < len(run):
            return None
        whole, part.run = part.run, None
        return whole

    def _quantize(self, part: ShardBuffer, start: int, values: torch.Tensor) -> None:
        precision = () if part.target.precision is None else (part.target.precision,)
        packed, statistics = self.quantizer.quantize(values, *precision)
        check_run(self.quantizer, part.target.fqn, values, packed, statistics)
        form, share = part.target.form, part.slice
        assert form.blocksize is not None
        nbytes = self._numel(part.target) * part.target.dtype.itemsize
        is_all = packed.numel() == nbytes and statistics.numel() == len(share.blocks)
        if is_all and values.numel() == len(share.elements) and start == form.elements(share.keeps).start:
            part.data, part.statistics = packed.view(part.target.dtype), statistics
            return
        if part.statistics is None:
            self._make_room(part)
        assert part.statistics is not None
        itemsize = part.data.element_size()
        out = part.data.view(torch.uint8)
        first_byte = start // 2
        mine = _common(
            range(first_byte, first_byte + packed.numel()),
            range(share.reads.start * itemsize, share.reads.stop * itemsize),
        )
        at = mine.start - share.keeps.start * itemsize
        out[at : at + len(mine)] = packed[mine.start - first_byte : mine.stop - first_byte]
        first_block = start // form.blocksize
        owned = _common(range(first_block, first_block + statistics.numel()), share.blocks)
        at = owned.start - share.blocks.start
        part.statistics[at : at + len(owned)] = statistics[owned.start - first_block : owned.stop - first_block]


def _common(one: range, other: range) -> range:
    """What two ranges of step 1 share; an empty range inside of `other` if nothing."""
    start = min(max(one.start, other.start), other.stop)
    return range(start, max(min(one.stop, other.stop), start))
