"""Quantized layers to try patches on, and a check that a patch leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn


def quantized(
    inputs: int = 64,
    outputs: int = 32,
    *,
    storage: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Linear4bit:
    """A Linear4bit, computing in float32, quantized by bitsandbytes on the CPU."""
    torch.manual_seed(seed)
    options = {"bias": False, "quant_type": "nf4", "compress_statistics": True, **options}
    layer = Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_storage=storage, **options)
    return layer.to("cpu")


def with_plain_weight(layer: Linear4bit) -> Linear4bit:
    """The layer, its weight a plain Parameter over the same memory, as FSDP leaves it."""
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return layer


def on_meta(layer: Linear4bit) -> Linear4bit:
    """The layer, its packed weight on meta and its quant_state where it was."""
    attributes = {**vars(layer.weight)}
    layer.weight = Params4bit(layer.weight.data.to("meta"), requires_grad=False, **attributes)
    return layer


def dequantized(layer: Linear4bit) -> torch.Tensor:
    """The logical weight, from the packed data and the module's quant_state."""
    stored = layer._parameters["weight"]
    assert stored is not None
    return bnb.functional.dequantize_4bit(stored.data, layer.quant_state)


@contextmanager
def unchanged(*owners: type | ModuleType) -> Iterator[None]:
    """Checks that each `__dict__` holds, after the block, exactly the objects that it held before."""
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, expected in zip(owners, before, strict=True):
        assert vars(owner).keys() == expected.keys()
        assert [name for name, value in expected.items() if vars(owner)[name] is not value] == []
