"""A stand-in for what `torch._foreach_copy_` does on CUDA, for tests on a machine without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

HALF = (torch.bfloat16, torch.float16)


def nan_words(dtype: torch.dtype, count: int) -> torch.Tensor:
    """`count` values of `dtype` (bfloat16 or float16), all of them NaN: every bit pattern in turn; (count,)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    words = patterns[patterns.view(dtype).isnan()]
    return words.repeat(count // len(words) + 1)[:count].view(dtype)


@contextlib.contextmanager
def rewritten_nans() -> Iterator[None]:
    """Until the end of the block, copying bfloat16 or float16 makes one NaN of all, as on CUDA.

    A mock, because the CPU copies bit for bit: without one, no test on a CPU could tell the patch from its absence.
    """
    with mock.patch.object(torch, "_foreach_copy_", _copy_as_numbers):
        yield


def _copy_as_numbers(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
        if target.dtype in HALF:
            target.masked_fill_(target.isnan(), torch.nan)
