"""4-bit weights that bitsandbytes' kernel for a CPU dequantizes wrongly, in any model, ours and stock alike."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn

import patches
from surgery.model.fqn import clean, join

__all__ = ["REMEDY", "misread_weights"]

#: The patch under which they are dequantized right.
REMEDY = "bitsandbytes.cpu-dequantize-flat"

#: Where the kernel is used: rows of a multiple of so many values, and smaller blocks than that. Elsewhere the one that
#: bitsandbytes has for any processor is, and right.
STEP, BLOCKSIZE_LIMIT = 16, 2048


def misread_weights(model: nn.Module) -> list[str]:
    """FQNs of the weights of `model`, on the CPU, that this machine's kernel takes for others.

    Their rows are not whole blocks. Empty where the processor has no such kernel, or `REMEDY` is active.
    """
    names = [
        clean(join(name, "weight"))
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and _has_partial_blocks(module)
    ]
    if not names or any(receipt.id == REMEDY for receipt in patches.active()):
        return []
    return names if str(patches.verdict(REMEDY)) == "needed" else []


def _has_partial_blocks(layer: Linear4bit) -> bool:
    state: Any = layer.quant_state  # of a shard, whose parameter says nothing of blocks
    rows = layer.in_features
    return bool(rows % state.blocksize) and rows % STEP == 0 and state.blocksize < BLOCKSIZE_LIMIT
