"""What a rank holds of the tensors of a model while they are loaded: parts that fill up, then wholes or shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.placement import Residence
from surgery.quantizers.base import Quantizer
from surgery.slices import Division, Slice
from surgery.targets import Target

__all__ = ["Part", "Parts"]

#: What torch's CUDA allocator rounds sizes up to, in bytes.
ROUNDING = 512


@dataclass(kw_only=True, eq=False)
class Part:
    """This rank's part of one target.

    data: 1-D, in the dtype in which the target is stored: the rows of `slice.keeps`, and room for the rows that other
        ranks keep more of. statistics: float32, one for each of `slice.blocks`; None for what is not quantized.
    state: what belongs to the packed data of the whole weight, once all statistics are known.
    converted: the whole tensor in the checkpoint's dtype, flat, on the CPU, on the one rank that has converted it.
    is_whole: whether `data` has become the whole tensor (on rank 0's CPU), or its shape on meta.
    """

    target: Target
    slice: Slice
    data: torch.Tensor
    statistics: torch.Tensor | None = None
    state: Any = None
    converted: torch.Tensor | None = None
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
class Parts:
    """All parts of this rank, by the FQN of their target. Layer passes fill them; `install` takes them."""

    quantizer: Quantizer = field(repr=False)
    division: Division
    residence: Residence
    rank: int
    found: dict[str, Part] = field(default_factory=dict, repr=False)

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
        rows = self.division.capacity(target.form, self.rank)
        return -(-rows * target.shape[1:].numel() * target.dtype.itemsize // ROUNDING) * ROUNDING

    def begin(self, target: Target) -> Part:
        """An empty part, on the device where it is made."""
        share = self.division.slice(target.form, self.rank)
        rows = self.division.capacity(target.form, self.rank)
        part = Part(
            target=target,
            slice=share,
            data=torch.empty(rows * target.shape[1:].numel(), dtype=target.dtype, device=self._made_on(target)),
        )
        if target.is_quantized:
            part.statistics = torch.empty(len(share.blocks), dtype=torch.float32, device=self.residence.compute_device)
        self.found[target.fqn] = part
        return part

    def _made_on(self, target: Target) -> torch.device:
        """The compute device, but for what rank 0 alone keeps as it is read."""
        if self.division.is_rank0s(target.form):
            return self.residence.data_device
        return self.residence.compute_device

    def of(self, targets: Iterable[Target]) -> list[Part]:
        """The parts of `targets`."""
        return [self.found[target.fqn] for target in targets]

    def fill(self, part: Part, start: int, values: torch.Tensor) -> None:
        """Put the `values` of the checkpoint, 1-D, from element `start` of its tensor on, in their place.

        They may be on the CPU still (pinned, or not). For a quantized target they are whole blocks.
        """
        if part.target.is_quantized:
            self._quantize(part, start, values.to(self.residence.compute_device, non_blocking=True))
            return
        first = start - part.target.form.elements(part.slice.keeps).start
        part.data[first : first + values.numel()].copy_(values, non_blocking=True)

    def _quantize(self, part: Part, start: int, values: torch.Tensor) -> None:
        form, share = part.target.form, part.slice
        assert form.blocksize is not None
        assert part.statistics is not None
        run = self.quantizer.run_elements(values.device)
        itemsize = part.data.element_size()
        out = part.data.view(torch.uint8)
        for offset in range(0, values.numel(), run):
            packed, statistics = self.quantizer.quantize(values[offset : offset + run])
            first_byte = (start + offset) // 2
            mine = _common(
                range(first_byte, first_byte + packed.numel()),
                range(share.reads.start * itemsize, share.reads.stop * itemsize),
            )
            at = mine.start - share.keeps.start * itemsize
            out[at : at + len(mine)] = packed[mine.start - first_byte : mine.stop - first_byte]
            first_block = (start + offset) // form.blocksize
            owned = _common(range(first_block, first_block + statistics.numel()), share.blocks)
            at = owned.start - share.blocks.start
            part.statistics[at : at + len(owned)] = statistics[owned.start - first_block : owned.stop - first_block]


def _common(one: range, other: range) -> range:
    """What two ranges of step 1 share; an empty range inside of `other` if nothing."""
    start = min(max(one.start, other.start), other.stop)
    return range(start, max(min(one.stop, other.stop), start))
