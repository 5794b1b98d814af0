"""4-bit weights by a look-up in the code table, in plain torch: what every kernel has to agree with."""

from __future__ import annotations

import math
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

__all__ = ["look_up", "require_looked_up"]

#: Largest distance of a value from the nearest of the 16, in units of its block's largest; nf4's and fp4's largest gaps
#: are 0.304 and 0.334.
LARGEST_ERROR = {"nf4": 0.153, "fp4": 0.168}


def look_up(packed: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """The float32 weight of shape `quant_state.shape` that is in packed data of any storage dtype; on the CPU."""
    codes = packed.detach().contiguous().cpu().view(-1).view(torch.uint8)
    pairs = torch.stack((codes >> 4, codes & 15), dim=1).view(-1).long()  # the high half of a byte comes first
    elements = math.prod(quant_state.shape)
    values = get_4bit_type(quant_state.quant_type, device="cpu")[pairs][:elements]
    statistics = _statistics(quant_state).repeat_interleave(quant_state.blocksize)[:elements]
    weight: torch.Tensor = (values * statistics).view(tuple(quant_state.shape))
    return weight


def _statistics(quant_state: Any) -> torch.Tensor:
    """The largest absolute value of each block, by the table of 256 codes where those are quantized too."""
    statistics: torch.Tensor = quant_state.absmax.detach().cpu()
    if not quant_state.nested:
        return statistics.float()
    nested = quant_state.state2
    scales: torch.Tensor = nested.absmax.cpu().repeat_interleave(nested.blocksize)[: statistics.numel()]
    offset: torch.Tensor = quant_state.offset.cpu()
    table: torch.Tensor = create_dynamic_map()
    return table[statistics.long()] * scales + offset


def require_looked_up(found: torch.Tensor, packed: torch.Tensor, quant_state: Any, weight: torch.Tensor) -> None:
    """`found`, dequantized by a kernel, is what a look-up gives, and that is near `weight`, which was quantized.

    Near: within half of the largest gap between two codes, and what double quantization has changed the statistics by.
    Raises AssertionError.
    """
    looked_up = look_up(packed, quant_state)
    if found.is_cpu:
        assert torch.equal(found, looked_up.to(found.dtype)), "the kernel gives other values than the table"
    torch.testing.assert_close(found.cpu(), looked_up.to(found.dtype))
    blocksize, flat = quant_state.blocksize, weight.detach().cpu().float().reshape(-1)
    largest = torch.stack([block.abs().max() for block in torch.split(flat, blocksize)])
    allowed = largest * LARGEST_ERROR[quant_state.quant_type] + (largest - _statistics(quant_state)).abs()
    errors = torch.stack([block.abs().max() for block in torch.split(looked_up.view(-1) - flat, blocksize)])
    assert bool((errors <= allowed).all()), "the packed data is not that of the weight"
