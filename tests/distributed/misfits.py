"""Formats that break one promise of the protocol each, and what a rank says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.quantizers.base import Layout
from surgery.quantizers.bnb import Bnb4bit

__all__ = ["BEFORE_READING", "SAYS", "refused_misfits"]


class ByteAValue(Bnb4bit):
    """Right for itself, and built without an error before sizes were checked."""

    def replacement(self, module: Any) -> nn.Module:
        new: Any = super().replacement(module)
        rows = module.weight.numel() // new.weight.dtype.itemsize
        new.weight = nn.Parameter(torch.empty(rows, 1, dtype=new.weight.dtype, device="meta"), requires_grad=False)
        return new

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return run.char().view(torch.uint8), super().quantize(run, layout, dtype)[1]


class RowsOfTwo(Bnb4bit):
    """Stored as `(n / 2, 2)`."""

    def replacement(self, module: Any) -> nn.Module:
        new: Any = super().replacement(module)
        new.weight = nn.Parameter(new.weight.data.view(-1, 2), requires_grad=False)
        return new


class OddBlocks(Bnb4bit):
    """A block would begin in the middle of a byte."""

    def layout(self, module: Any, name: str) -> Layout:
        return replace(super().layout(module, name), blocksize=63)


class BytesOfAValue(Bnb4bit):
    """Promises two values a byte, and makes one."""

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return run.char().view(torch.uint8), super().quantize(run, layout, dtype)[1]


class StatisticsOfHalfBlocks(Bnb4bit):
    """Two statistics a block, as of a lowest and a highest value."""

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, statistics = super().quantize(run, layout, dtype)
        return packed, statistics.repeat_interleave(2)


class OneStatisticTooFew(Bnb4bit):
    """Of the last block, which may be partial."""

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, statistics = super().quantize(run, layout, dtype)
        return packed, statistics[:-1]


class HalfStatistics(Bnb4bit):
    """Statistics in 16 bits."""

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, statistics = super().quantize(run, layout, dtype)
        return packed, statistics.half()


class SignedBytes(Bnb4bit):
    """Packed data in a column, as integers with a sign."""

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, statistics = super().quantize(run, layout, dtype)
        return packed.view(torch.int8).view(-1, 1), statistics


#: Refused before a weight is read.
BEFORE_READING = (ByteAValue, RowsOfTwo, OddBlocks)

#: What is said of a 64 x 64 weight in bfloat16, blocksize 64.
SAYS: dict[type[Bnb4bit], tuple[str, ...]] = {
    ByteAValue: ("q_proj.weight", "(64, 64)", "2048 bytes", "4096 bytes", "2 elements a byte"),
    RowsOfTwo: ("q_proj.weight", "(n, 1)", "(512, 2)"),
    OddBlocks: ("blocksize of whole bytes, 2 elements each", "63"),
    BytesOfAValue: ("q_proj.weight", "packed data torch.uint8", "2 elements a byte"),
    StatisticsOfHalfBlocks: ("q_proj.weight", "statistics torch.float32", "one for each block of 64"),
    OneStatisticTooFew: ("q_proj.weight", "one for each block of 64"),
    HalfStatistics: ("found torch.uint8", "torch.float16"),
    SignedBytes: ("packed data torch.uint8", "found torch.int8", ", 1)"),
}


def refused_misfits(checkpoint: Path, shard: Any = None) -> dict[str, str]:
    """What building a model says on this rank, by the name of the format; AssertionError where it is built."""
    import surgery
    from surgery.checkpoint import Reader
    from surgery.quantizers import base
    from tests.helpers.reads import count_reads

    said: dict[str, str] = {}
    for misfit in SAYS:
        reads, spy = count_reads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(base._FORMATS, surgery.Quant, (misfit,))
            patch.setattr(Reader, "read_bytes", spy)
            try:
                surgery.qlora(checkpoint, shard=shard, report=surgery.Report())
            except surgery.SurgeryError as error:
                # This rank's own, or what it hears of another's.
                said[misfit.__name__] = f"{type(error).__name__}: {error}"
        assert not (reads and misfit in BEFORE_READING), f"{misfit.__name__}: weights were read: {reads}"
    assert len(said) == len(SAYS), f"built: {SAYS.keys() - said.keys()}"
    return said
