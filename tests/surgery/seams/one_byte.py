"""A format that no library has: one byte a value, in blocks of 64 or of a row. All that it takes is in this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.quantizers.base import Layout, QuantFormat, register

__all__ = ["OneByte", "OneByteFormat"]


@dataclass(frozen=True, kw_only=True)
class OneByte:
    """The options of the format. by_row: a block is a row of the weight, whatever its length."""

    by_row: bool = False
    skip_modules: tuple[str, ...] = ()


class OneByteLinear(nn.Linear):
    """A linear layer over a packed weight of one byte a value."""

    quant_state: torch.Tensor
    blocksize: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.weight.view(-1).view(torch.uint8)[: self.in_features * self.out_features].to(x.dtype) - 128
        blocks = nn.functional.pad(values, (0, -values.numel() % self.blocksize)).view(-1, self.blocksize)
        scaled = (blocks.float() * self.quant_state[:, None] / 127).view(-1)[: values.numel()]
        return nn.functional.linear(x, scaled.view(self.out_features, self.in_features).to(x.dtype), self.bias)


class OneByteFormat(QuantFormat):
    """Bytes around 128, each a 127th of the largest value of its block."""

    label = "one byte a value"

    def replacement(self, module: Any) -> nn.Module:
        new = OneByteLinear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        new.blocksize = module.in_features if self.options.by_row else 64
        packed = self.layout(new, "weight").packed_shape(module.weight.shape, self.storage)
        new.weight = nn.Parameter(torch.empty(packed, dtype=self.storage, device="meta"), requires_grad=False)
        if module.bias is not None:
            new.bias = nn.Parameter(torch.empty(module.bias.shape, dtype=self.dtype, device="meta"))
        return new.requires_grad_(requires_grad=False)

    @classmethod
    def is_quantized(cls, module: nn.Module) -> bool:
        return isinstance(module, OneByteLinear)

    def layout(self, module: Any, name: str) -> Layout:
        return Layout(values_per_byte=1, blocksize=module.blocksize)

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = run.to(dtype or self.dtype).float()
        blocks = nn.functional.pad(values, (0, -values.numel() % layout.blocksize)).view(-1, layout.blocksize)
        largest = blocks.abs().amax(1).clamp_min(1e-8)
        return ((blocks / largest[:, None] * 127).round() + 128).to(torch.uint8).view(-1)[: run.numel()], largest


register(OneByte, OneByteFormat)
