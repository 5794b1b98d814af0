"""`bitsandbytes.cpu-matmul-flat`: on a CPU, a layer whose rows are not whole blocks multiplies by the right weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...registry import REGISTRY
from ._product import multiply
from ._specimen import partial_block_rows
from ._whole_blocks import has_partial_blocks

if TYPE_CHECKING:
    import torch

__all__ = ["multiply_by_blocks"]


def multiplies_by_wrong_weight() -> bool:
    """Whether the product with a small weight on this CPU differs from that with a table look-up."""
    import bitsandbytes

    if not hasattr(bitsandbytes.functional, "has_avx512bf16"):
        return False  # before 0.49, the first release with a kernel that takes rows
    return not _is_right(bitsandbytes.matmul_4bit)


def _is_right(matmul_4bit: Callable[..., torch.Tensor]) -> bool:
    import torch

    packed, quant_state, expected = partial_block_rows()
    # Transposed, as 0.49 requires; later releases take both.
    found = matmul_4bit(torch.eye(expected.shape[1]), packed.t(), quant_state)
    return bool((found - expected.t()).abs().max() < 1e-6)


def check_multiplies_by_blocks() -> None:
    """Raise RuntimeError if the wrapper's product, or its gradient, differs from that with a table look-up."""
    import torch
    from bitsandbytes import matmul_4bit

    packed, quant_state, expected = partial_block_rows()
    x = torch.ones(1, expected.shape[1], requires_grad=True)
    with torch.enable_grad():
        product = multiply_by_blocks(matmul_4bit, None, (x, packed, quant_state), {})
        (gradient,) = torch.autograd.grad(product.sum(), x)
    right = torch.allclose(product, expected.sum(1)) and torch.allclose(gradient, expected.sum(0))
    if not right or not _is_right(lambda *args: multiply_by_blocks(matmul_4bit, None, args, {})):
        raise RuntimeError("the product with a weight whose rows are not whole blocks is wrong")


@REGISTRY.register(
    "bitsandbytes.cpu-matmul-flat",
    target="bitsandbytes:matmul_4bit",
    reason=(
        "on CPUs with AVX512, a product dequantizes the weight by an operator that takes its rows for whole blocks: "
        "where they are not, the layer multiplies by a wrong weight, without an error"
    ),
    # No upstream report was found; the source shows the defect (absmax_dim_1).
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/csrc/cpu_ops.cpp",
    requires={"bitsandbytes": ">=0.49"},
    signature="(A, B, quant_state, out=None, bias=None)",
    aliases="ignore",  # layers look the function up here; the binding in its defining module is never called
    subject=lambda _instance, args, kwargs: _quant_state(args, kwargs),
    probe=multiplies_by_wrong_weight,
    verify=check_multiplies_by_blocks,
)
def multiply_by_blocks(
    wrapped: Callable[..., torch.Tensor], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Replace `matmul_4bit`, for weights on the CPU whose rows are not whole blocks: dequantize in rows of one block.

    Forward and backward. To be limited to the quant_states of one model. Stock behaviour for any other weight, for an
    empty input, and for a weight that was quantized as `(in, out)`, which upstream has deprecated.
    """
    x, packed, quant_state, out, bias = _arguments(*args, **kwargs)
    if not has_partial_blocks(packed, quant_state) or not x.numel() or x.shape[-1] != quant_state.shape[-1]:
        return wrapped(*args, **kwargs)
    product = multiply(x, packed, bias, quant_state)
    return product if out is None else out.copy_(product)


def _arguments(A: Any, B: Any, quant_state: Any, out: Any = None, bias: Any = None) -> tuple[Any, ...]:  # noqa: N803 - upstream names
    return A, B, quant_state, out, bias


def _quant_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[2] if len(args) > 2 else kwargs["quant_state"]
