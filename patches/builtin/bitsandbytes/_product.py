"""Matrix product with a packed 4-bit weight, which is dequantized temporarily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ._whole_blocks import dequantize

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState

__all__ = ["multiply"]

#: The autograd function, once it has been built. In a list, because Dynamo looks through `functools.cache`.
_FUNCTION: Final[list[Any]] = []


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, quant_state: QuantState) -> torch.Tensor:
    """Compute `x @ weight.T + bias`, in the dtype of x; the weight has no gradient.

    x: `(..., in)`. packed: the weight, whose `quant_state` has the shape `(out, in)`. bias: `(out)`, in the dtype of x.
    """
    import torch

    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        if not _FUNCTION:
            _FUNCTION.append(_make_function())
        product: torch.Tensor = _FUNCTION[0].apply(x, packed, bias, quant_state)
        return product
    # A separate branch, as upstream has it: Dynamo warns of a Function whose inputs need no gradient.
    return torch.nn.functional.linear(x, dequantize(packed, quant_state, x.dtype), bias)


def _make_function() -> Any:
    import torch

    class Product(torch.autograd.Function):
        """The product as an autograd function that dequantizes the weight again for the backward pass."""

        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, quant_state: QuantState
        ) -> torch.Tensor:
            # Attributes of ctx, as in bitsandbytes: FSDP frees the memory of a packed weight after forward and refills
            # it for backward, which `save_for_backward` would report as an in-place change.
            ctx.packed, ctx.quant_state = packed, quant_state
            ctx.bias_dtype = None if bias is None else bias.dtype
            return torch.nn.functional.linear(x, dequantize(packed, quant_state, x.dtype), bias)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None, None]:
            of_x = of_bias = None
            if ctx.needs_input_grad[0]:
                # Cast through the dtype of the quant_state, as upstream does.
                weight = dequantize(ctx.packed, ctx.quant_state, ctx.quant_state.dtype)
                of_x = gradient @ weight.to(gradient.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=ctx.bias_dtype)
            return of_x, None, of_bias, None

    return Product
