"""Dequantization in rows of whole blocks, for which bitsandbytes' CPU kernels are correct with any weight shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState

__all__ = ["dequantize", "has_partial_blocks"]


def has_partial_blocks(packed: torch.Tensor, quant_state: QuantState | None) -> bool:
    """Whether a weight in bitsandbytes' packed layout is on the CPU and has rows that are not whole blocks.

    A weight that evaluation has repacked for AVX512-BF16 has another layout, and is handled by other kernels.
    """
    if quant_state is None or packed.device.type != "cpu" or getattr(quant_state, "packing_format_for_cpu", False):
        return False
    return bool(quant_state.shape[-1] % quant_state.blocksize)


def dequantize(packed: torch.Tensor, quant_state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize packed data of any shape and storage dtype to a weight of shape `quant_state.shape` in `dtype`.

    The kernel is called with rows of one block each, which its threads share: as fast as with the weight's own rows.
    Only if the last block of the weight is partial, it is called with a single row.
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
