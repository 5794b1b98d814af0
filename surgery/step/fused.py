"""A 4-bit linear layer and its LoRA adapter as one autograd function; layers that share their input share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from surgery.step.dequantize import Workspace, dequantize

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["Adapted", "Choice", "products"]


class Choice(NamedTuple):
    """What does not change from one layer of a call to the next.

    base, lora: the dtypes that the base weights, and the adapters, are multiplied in; the first is that of the values of
    the weights. workspace: where these are dequantized.
    """

    base: torch.dtype
    lora: torch.dtype
    workspace: Workspace


class Adapted(NamedTuple):
    """One layer with its adapter, as its parameters are at the moment of a call.

    packed, state: the weight `(out, in)`, as bitsandbytes packs it. bias: `(out,)` or None. a: `(r, in)`. b: `(out, r)`.
    dropped: the input after the layer's dropout; None if that drops nothing.
    """

    packed: torch.Tensor
    state: QuantState
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropped: torch.Tensor | None


def products(x: torch.Tensor, layers: Sequence[Adapted], choice: Choice) -> tuple[torch.Tensor, ...]:
    """`x W^T + bias + scaling * (dropout(x) A^T) B^T` of each layer, `(..., out)` in the dtype of `x`.

    x: `(..., in)`, the input of all of them. Between forward and backward `x`, `x A^T` and nothing else is kept; weights
    are dequantized for each product, one after the other, into the same memory.

    Arithmetic is PEFT's and bitsandbytes', except that what LoRA adds is scaled and added in the precision in which
    a product is accumulated, where PEFT rounds both to the dtype of `x`; so are the parts of the gradient of `x`. In
    float32 the difference is in the last bits.
    """
    shared = all(layer.dropped is None for layer in layers)
    if not shared:
        layers = [layer if layer.dropped is not None else layer._replace(dropped=x) for layer in layers]
    low = _low_ranks(x, layers, choice, shared=shared)
    inputs = [tensor for layer in layers for tensor in (layer.a, layer.b, layer.bias, layer.dropped)]
    kept = _Keep.apply(x, low, shared, *inputs).grad_fn  # the node: through the tensor backward would come to it
    found: tuple[torch.Tensor, ...] = _Products.apply(x, low, kept, layers, choice, shared, *inputs)
    return found


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


@torch.no_grad()
def _low_ranks(x: torch.Tensor, layers: Sequence[Adapted], choice: Choice, *, shared: bool) -> torch.Tensor:
    """`(dropped) A^T` of all layers side by side, `(tokens, sum of ranks)`; by one product if none drops anything."""
    dtype = choice.lora
    if shared:
        return _flat(x, dtype) @ _stacked([layer.a for layer in layers], dtype).t()
    return torch.cat([_flat(layer.dropped, dtype) @ layer.a.to(dtype).t() for layer in layers], dim=1)


def _stacked(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All rows of the factors A, `(sum of ranks, in)`."""
    if len(factors) == 1:
        return factors[0].to(dtype)
    return torch.cat([factor.to(dtype) for factor in factors])


def _columns(low: torch.Tensor, factors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The part of `low` of each layer: a view."""
    return iter(torch.split(low, [a.shape[0] for a in factors], dim=1))


class _Keep(torch.autograd.Function):
    """A node that keeps what backward needs, before the products are computed.

    A checkpoint stops recomputing when the last kept tensor is there: so it never computes a block's last product.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        x, low, shared, *others = inputs
        ctx.save_for_backward(low, *others[0::4], *others[1::4], *([x] if shared else others[3::4]))
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        raise AssertionError("nothing is computed of what only keeps")


class _Products(torch.autograd.Function):
    """The products, and their backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor, kept: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
        layers, choice, shared, *inputs = rest
        # The packed weight is an attribute, as in bitsandbytes: FSDP frees its memory after forward and refills it for
        # backward, which `save_for_backward` would report as a change in place.
        ctx.weights = [(layer.packed, layer.state) for layer in layers]
        ctx.scalings = [layer.scaling for layer in layers]
        ctx.biases = [None if bias is None else bias.dtype for bias in inputs[2::4]]
        ctx.kept, ctx.choice, ctx.shared, ctx.shape, ctx.dtype = kept, choice, shared, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        flat = _flat(x, choice.base)
        parts = _columns(low, inputs[0::4])
        return tuple(
            _product(flat, layer, part, choice, x.dtype).view(*x.shape[:-1], -1)
            for layer, part in zip(layers, parts, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.weights)
        low, *saved = ctx.kept.saved_tensors
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.kept = None  # which nothing else frees, since no gradient goes through it
        a, b, given = saved[:count], saved[count : 2 * count], saved[2 * count :]
        flat = [None if gradient is None else gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        lora = ctx.choice.lora
        of_low, of_b = _of_low(flat, low, a, b, ctx.scalings, lora)
        of_x = _of_input(ctx, flat) if ctx.needs_input_grad[0] else None
        if ctx.shared:
            stacked = _stacked(a, lora)
            of_a = list(_rows((of_low.t() @ _flat(given[0], lora)), a))
            of_x = None if of_x is None else _added(of_x, of_low, stacked)
            of_dropped: list[torch.Tensor | None] = [None] * count
        else:
            parts = list(_columns(of_low, a))
            of_a = [part.t() @ _flat(each, lora) for part, each in zip(parts, given, strict=True)]
            of_dropped = [(part @ each.to(lora)).to(ctx.dtype).view(ctx.shape) for part, each in zip(parts, a, strict=True)]
        found: list[Any] = [None if of_x is None else of_x.view(ctx.shape), None, None, None, None, None]
        for number in range(count):
            needs = ctx.needs_input_grad[6 + 4 * number : 10 + 4 * number]
            bias = None
            if needs[2] and flat[number] is not None:
                bias = flat[number].sum(0, dtype=ctx.biases[number])
            each = (of_a[number].to(a[number].dtype), of_b[number].to(b[number].dtype), bias, of_dropped[number])
            found += [gradient if needed else None for gradient, needed in zip(each, needs, strict=True)]
        return tuple(found)


def _product(
    x: torch.Tensor, layer: Adapted, low: torch.Tensor, choice: Choice, dtype: torch.dtype
) -> torch.Tensor:
    """The product of one layer, `(tokens, out)` in `dtype`. x: `(tokens, in)`. low: `(tokens, r)`."""
    weight = dequantize(layer.packed, layer.state, choice.workspace)
    bias = None if layer.bias is None else layer.bias.to(choice.base)
    y = functional.linear(x, weight, bias).to(dtype)
    b = layer.b.to(choice.lora)
    if choice.lora == dtype:
        return y.addmm_(low, b.t(), alpha=layer.scaling)
    return y.add_((low @ b.t() * layer.scaling).to(dtype))


def _of_low(
    gradients: Sequence[torch.Tensor | None],
    low: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradients of `low`, `(tokens, sum of ranks)`, and of each factor B, `(out, r)`."""
    of_low, of_b = torch.empty_like(low), []
    rows = zip(gradients, _columns(low, a), _columns(of_low, a), b, scalings, strict=True)
    for gradient, part, of_part, factor, scaling in rows:
        found = torch.empty_like(factor, dtype=dtype)
        if gradient is None:
            of_part.zero_()
            of_b.append(found.zero_())
            continue
        cast = gradient.to(dtype)
        of_part.addmm_(cast, factor.to(dtype), beta=0, alpha=scaling)
        of_b.append(found.addmm_(cast.t(), part, beta=0, alpha=scaling))
    return of_low, of_b


def _of_input(ctx: Any, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """What the base weights make of the gradients, summed, `(tokens, in)` in the dtype of the input."""
    found: torch.Tensor | None = None
    for gradient, (packed, state) in zip(gradients, ctx.weights, strict=True):
        if gradient is None:
            continue
        cast = gradient.to(ctx.choice.base)
        weight = dequantize(packed, state, ctx.choice.workspace)
        found = cast @ weight if found is None else found.addmm_(cast, weight)
    assert found is not None, "autograd calls no backward without a gradient"
    return found.to(ctx.dtype)


def _added(of_x: torch.Tensor, of_low: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return of_x.addmm_(of_low, a) if of_low.dtype == of_x.dtype else of_x.add_(of_low @ a)


def _rows(stacked: torch.Tensor, factors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows of each factor A."""
    return iter(torch.split(stacked, [a.shape[0] for a in factors]))
