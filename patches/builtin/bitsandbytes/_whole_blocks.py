"""Dequantization in rows of whole blocks, which bitsandbytes' CPU kernels get right for weights of any shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState

__all__ = ["dequantize", "has_partial_blocks"]


def has_partial_blocks(packed: torch.Tensor, quant_state: QuantState | None) -> bool:
    """Whether a weight on the CPU, in bitsandbytes' packed layout, has rows that are not whole blocks.

    One that evaluation has repacked for AVX512-BF16 is in another layout, and goes to other kernels.
    """
    if quant_state is None or packed.device.type != "cpu" or getattr(quant_state, "packing_format_for_cpu", False):
        return False
    return bool(quant_state.shape[-1] % quant_state.blocksize)


def dequantize(packed: torch.Tensor, quant_state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight of shape `quant_state.shape`, in `dtype`, from packed data of any shape and storage dtype.

    The kernel is told of rows of one block each. It is as fast as with the weight's own rows, which its threads share;
    only where the last block of the weight is partial, it is told of a single row.
    """
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    absmax = quant_state.absmax
    if quant_state.nested:
        absmax = dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
    elements, blocksize = quant_state.shape.numel(), quant_state.blocksize
    shape = (1, elements) if elements % blocksize else (elements // blocksize, blocksize)
    flat: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.reshape(-1, 1), absmax.float(), blocksize, quant_state.quant_type, shape, dtype
    )
    return flat.reshape(quant_state.shape)
