"""`bitsandbytes.cpu-dequantize-flat`: on a CPU, a weight whose rows are not whole blocks is dequantized right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...registry import REGISTRY
from ._specimen import partial_block_rows
from ._whole_blocks import dequantize, has_partial_blocks

if TYPE_CHECKING:
    import torch

__all__ = ["dequantize_by_blocks"]


def dequantizes_with_wrong_statistics() -> bool:
    """Whether this CPU dequantizes a small weight, with rows of a quarter block, unlike a table look-up."""
    from bitsandbytes import functional

    if not hasattr(functional, "has_avx512bf16"):
        return False  # before 0.49, the first release with a kernel that takes rows
    return not _is_right(functional.dequantize_4bit)


def _is_right(dequantize_4bit: Callable[..., torch.Tensor]) -> bool:
    packed, quant_state, expected = partial_block_rows()
    return bool((dequantize_4bit(packed, quant_state) - expected).abs().max() < 1e-6)


def check_dequantizes_by_blocks() -> None:
    """Raise RuntimeError if the wrapper dequantizes a small weight unlike a table look-up."""
    from bitsandbytes.functional import dequantize_4bit

    if not _is_right(lambda *args: dequantize_by_blocks(dequantize_4bit, None, args, {})):
        raise RuntimeError("a weight whose rows are not whole blocks is not dequantized as a table look-up does it")


@REGISTRY.register(
    "bitsandbytes.cpu-dequantize-flat",
    target="bitsandbytes.functional:dequantize_4bit",
    reason=(
        "on CPUs with AVX512, the kernel takes the rows of a weight for whole blocks: where in_features is a multiple "
        "of 16 and not of the block size, values are multiplied by other blocks' statistics, without an error"
    ),
    # No upstream report was found; the source shows the defect (absmax_dim_1).
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/csrc/cpu_ops.cpp",
    requires={"bitsandbytes": ">=0.49"},
    needs=("bitsandbytes.cpu-matmul-flat",),
    signature="(A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type='fp4')",
    subject=lambda _instance, args, kwargs: _quant_state(args, kwargs),
    probe=dequantizes_with_wrong_statistics,
    verify=check_dequantizes_by_blocks,
)
def dequantize_by_blocks(
    wrapped: Callable[..., torch.Tensor], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Replace `dequantize_4bit`, for weights on the CPU whose rows are not whole blocks, by rows of one block each.

    To be limited to the quant_states of one model. Everything else keeps the stock behaviour: weights on other devices
    or of whole blocks, calls without a quant_state or with `out` (which has no CPU kernel), and direct calls of the
    operators `torch.ops.bitsandbytes`.
    """
    packed, quant_state = args[0] if args else kwargs["A"], _quant_state(args, kwargs)
    has_out = (args[3] if len(args) > 3 else kwargs.get("out")) is not None
    if has_out or not has_partial_blocks(packed, quant_state):
        return wrapped(*args, **kwargs)
    weight = dequantize(packed, quant_state, quant_state.dtype)
    return weight.t() if packed.shape[0] == 1 else weight  # as upstream does for transposed packed data


def _quant_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("quant_state")
