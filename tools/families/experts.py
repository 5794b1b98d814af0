"""Experts in 4 bits: the bytes of each expert, and the logits of a stock model that has the values of these bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit

import surgery
from families import arms
from families.inputs import logits_of
from surgery.quantizers.base import STATISTICS
from surgery.quantizers.experts import has_experts
from surgery.quantizers.stack import as_bytes, stacks_of

__all__ = ["different_experts"]


def different_experts(folder: Path) -> list[str] | None:
    """Differences of the experts of the model of `folder` from stock's, maybe none; None if it has no experts.

    Raises `surgery.ConfigError` for experts that cannot be had in 4 bits.
    """
    stock = arms.stock(folder)
    if not has_experts(stock):
        return None
    ours: Any = surgery.qlora(folder, quant=surgery.Quant("nf4"), dtype=torch.bfloat16, report=surgery.Report())
    with ours as model:
        return [*_different_bytes(model.train(), stock), *_different_logits(model, stock)]


def _different_bytes(model: Any, stock: Any) -> Iterator[str]:
    """Compare each expert of `model` with `quantize_4bit` of its slice in `stock`, which gets its values after that."""
    for prefix, module in model.named_modules():
        for name, stack in stacks_of(module).items():
            packed, statistics = module.get_parameter(name), module.get_parameter(name + STATISTICS)
            weight = stock.get_parameter(f"{prefix}.{name}").data
            made = [quantize_4bit(expert, quant_type="nf4", compress_statistics=True)[0].view(-1) for expert in weight]
            if not torch.equal(torch.cat(made), as_bytes(packed)):
                yield f"bytes of {prefix}.{name}"
            weight.copy_(stack.dequantize(packed, statistics, range(stack.experts)))


def _different_logits(model: Any, stock: Any) -> Iterator[str]:
    logits = []
    for each in (model, stock):
        torch.manual_seed(0)  # some routers draw
        logits.append(logits_of(each))
    if not torch.equal(*logits):
        yield f"logits with experts in 4 bits: off by {(logits[0] - logits[1]).abs().max():.2g}"
