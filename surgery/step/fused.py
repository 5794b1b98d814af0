"""A 4-bit linear layer and its LoRA adapter as one autograd function; layers that share their input share one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from surgery.step.dequantize import Workspace

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["Adapted", "Choice", "products"]


class Choice(NamedTuple):
    """Settings that all layers of a call share.

    base, lora: the dtypes that base weights, and adapters, are multiplied in; the first is that of dequantized values.
    workspace: where these are.
    """

    base: torch.dtype
    lora: torch.dtype
    workspace: Workspace


class Adapted(NamedTuple):
    """One layer with its adapter, as its parameters are at the moment of a call.

    packed, state: the weight `(out, in)`, as bitsandbytes packs it: bytes, 1-D and uint8. bias: `(out,)` or None.
    a: `(r, in)`. b: `(out, r)`. dropped: the input after the layer's dropout; None if no layer's drops anything.
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

    x: `(..., in)`, the input of all of them. Between forward and backward `x`, `x A^T` and no more is kept; no `x` that
    is a product of what is kept anyway, as that of a gated MLP is. Weights are dequantized for each product, one after
    the other, into the same memory.

    The arithmetic is that of PEFT and bitsandbytes, but what LoRA adds is scaled and added in the precision in which
    products are accumulated, where PEFT rounds to the dtype of `x` each time; so are the parts of the gradient of `x`.
    In float32 the difference is in the last bits.
    """
    shared = layers[0].dropped is None
    low = _low_ranks(x, layers, choice, shared=shared)
    inputs = [tensor for layer in layers for tensor in (layer.a, layer.b, layer.bias, layer.dropped)]
    keep: Any = _Keep.apply
    multiply: Any = _Products.apply
    again = _again(x) if shared and layers[0].a.requires_grad else None
    # In a list, which autograd does not look into.
    kept = [keep(x if again is None else None, low, shared, *inputs), again]
    found: tuple[torch.Tensor, ...] = multiply(x, low, kept, layers, choice, *inputs)
    return found


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


@torch.no_grad()
def _low_ranks(x: torch.Tensor, layers: Sequence[Adapted], choice: Choice, *, shared: bool) -> torch.Tensor:
    """`(dropped) A^T` of all layers side by side, `(tokens, sum of ranks)`; by one product if none drops anything."""
    dtype = choice.lora
    if shared:
        return _flat(x, dtype) @ _stacked([layer.a for layer in layers], dtype).t()
    given = [(layer.dropped, layer.a) for layer in layers if layer.dropped is not None]
    return torch.cat([_flat(dropped, dtype) @ a.to(dtype).t() for dropped, a in given], dim=1)


def _stacked(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All rows of the factors A, `(sum of ranks, in)`."""
    if len(factors) == 1:
        return factors[0].to(dtype)
    return torch.cat([factor.to(dtype) for factor in factors])


def _columns(low: torch.Tensor, factors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The part of `low` of each layer: a view."""
    return iter((low,) if len(factors) == 1 else torch.split(low, [a.shape[0] for a in factors], dim=1))


def _again(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """A function that computes `x` once more, before its own node is freed, of what that keeps; None if it cannot.

    It cannot where somebody packs what is saved, now or when `x` was computed, as checkpoints do, which unpack it once.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    node: Any = x.grad_fn
    if node is None or hooks is None or hooks(True) is not None:  # noqa: FBT003 - upstream's signature
        return None
    if type(node).__name__ == "LigerSiLUMulFunctionBackward":
        return functools.partial(_gated, node) if _are_there(node._raw_saved_tensors) else None
    if type(node).__name__ != "MulBackward0" or not _are_there((node._raw_saved_self, node._raw_saved_other)):
        return None
    return functools.partial(_multiplied, node)


def _are_there(saved: Iterable[Any]) -> bool:
    """Whether a node has saved all of `saved`, and as they are."""
    return all(each.unpack_hook is None and each.data is not None for each in saved)


@torch.no_grad()
def _multiplied(node: Any) -> torch.Tensor:
    product: torch.Tensor = node._saved_self * node._saved_other
    return product


@torch.no_grad()
def _gated(node: Any) -> torch.Tensor:
    compute: Any = type(node)._forward_cls
    product: torch.Tensor = compute.apply(*node.saved_tensors, node.gate_multiplier, node.down_multiplier)
    return product


class _Keep(torch.autograd.Function):
    """A node that keeps what backward needs, before the products are computed.

    A checkpoint stops recomputing when the last kept tensor is there: so it never computes a block's last product.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor | None, low: torch.Tensor, shared: bool, *inputs: Any) -> torch.Tensor:  # noqa: FBT001
        ctx.save_for_backward(low, *inputs[0::4], *inputs[1::4], *([x] if shared else inputs[3::4]))
        return low.new_empty(0)

    @staticmethod
    def backward(_ctx: Any, *_gradients: Any) -> Any:
        raise AssertionError("nothing is computed of what only keeps")


class _Products(torch.autograd.Function):
    """The products, and their backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor, kept: list[Any], *rest: Any) -> tuple[torch.Tensor, ...]:
        layers, choice, *inputs = rest
        # The packed weight is an attribute, as in bitsandbytes: FSDP frees its memory after forward and refills it for
        # backward, which `save_for_backward` would report as a change in place.
        ctx.weights = [(layer.packed, layer.state) for layer in layers]
        ctx.scalings = [layer.scaling for layer in layers]
        ctx.biases = [None if bias is None or not bias.requires_grad else bias.dtype for bias in inputs[2::4]]
        ctx.kept, ctx.choice, ctx.shape, ctx.dtype, ctx.device = kept, choice, x.shape, x.dtype, x.device.type
        ctx.shared = inputs[3] is None
        ctx.set_materialize_grads(False)
        flat = _flat(x, choice.base)
        parts = _columns(low, inputs[0::4])
        return tuple(
            # In place, since models may change an output in place, which torch refuses for a view.
            _product(flat, layer, part, choice, x.dtype).resize_(*x.shape[:-1], layer.b.shape[0])
            for layer, part in zip(layers, parts, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        if all(gradient is None for gradient in gradients):  # a later function gave none
            return (None,) * len(ctx.needs_input_grad)
        if not ctx.kept:
            raise RuntimeError("Trying to backward through the graph a second time: use retain_graph=True in the first")
        if not torch.is_autocast_enabled(ctx.device):
            return _gradients(ctx, gradients)
        with torch.autocast(ctx.device, enabled=False):  # else some of what follows were in another dtype
            return _gradients(ctx, gradients)


def _gradients(ctx: Any, gradients: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """The gradients of all arguments of `_Products`."""
    count, lora = len(ctx.weights), ctx.choice.lora
    node, again = ctx.kept
    low, *saved = node.grad_fn.saved_tensors
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.kept.clear()  # which nothing else frees, since no gradient goes through it
    a, b, inputs = saved[:count], saved[count : 2 * count], saved[2 * count :]
    given = [_flat(again() if each is None else each, lora) for each in inputs]
    flat = [None if gradient is None else gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
    of_low, of_b = _of_low(low, zip(flat, a, b, ctx.scalings, strict=True))
    of_x = _of_input(ctx, flat) if ctx.needs_input_grad[0] else None
    of_dropped: list[torch.Tensor | None] = [None] * count
    if ctx.shared:
        of_a = _rows(of_low.t() @ given[0], a)
        of_x = None if of_x is None else _added(of_x, of_low, _stacked(a, lora))
    else:
        parts = list(_columns(of_low, a))
        of_a = iter([part.t() @ each for part, each in zip(parts, given, strict=True)])
        of_dropped = [(part @ each.to(lora)).view(ctx.shape) for part, each in zip(parts, a, strict=True)]
    of_bias = (
        None if dtype is None or gradient is None else gradient.sum(0, dtype=dtype)
        for gradient, dtype in zip(flat, ctx.biases, strict=True)
    )
    of_layers = [
        (None,) * 4 if gradient is None else found  # as where the layer was not called
        for gradient, *found in zip(flat, of_a, of_b, of_bias, of_dropped, strict=True)
    ]
    return None if of_x is None else of_x.view(ctx.shape), None, None, None, None, *chain(*of_layers)


def _product(x: torch.Tensor, layer: Adapted, low: torch.Tensor, choice: Choice, dtype: torch.dtype) -> torch.Tensor:
    """The product of one layer, `(tokens, out)` in `dtype`. x: `(tokens, in)`. low: `(tokens, r)`."""
    bias = None if layer.bias is None else layer.bias.to(choice.base)
    with choice.workspace.lock:
        y = functional.linear(x, choice.workspace.weight(layer.packed, layer.state), bias).to(dtype)
    b = layer.b.to(choice.lora)
    if choice.lora == dtype:
        return y.addmm_(low, b.t(), alpha=layer.scaling)
    return y.add_((low @ b.t() * layer.scaling).to(dtype))


def _of_low(
    low: torch.Tensor, layers: Iterable[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, float]]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The gradients of `low`, `(tokens, sum of ranks)`, and of each factor B, `(out, r)`, in the dtype of `low`.

    layers: the gradient of what each gave, `(tokens, out)`, its A, its B, and its scaling. Without one, B has none.
    """
    layers = list(layers)
    of_low = torch.empty_like(low)
    of_b: list[torch.Tensor | None] = []
    factors = [a for _, a, _, _ in layers]
    for (gradient, _, b, scaling), part, of_part in zip(
        layers, _columns(low, factors), _columns(of_low, factors), strict=True
    ):
        if gradient is None:
            of_part.zero_()
            of_b.append(None)
            continue
        cast = gradient.to(low.dtype)
        of_part.addmm_(cast, b.to(low.dtype), beta=0, alpha=scaling)
        of_b.append(torch.empty_like(b, dtype=low.dtype).addmm_(cast.t(), part, beta=0, alpha=scaling))
    return of_low, of_b


def _of_input(ctx: Any, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The gradient of the input through the base weights, summed, `(tokens, in)` in the dtype of the input."""
    found: torch.Tensor | None = None
    for gradient, (packed, state) in zip(gradients, ctx.weights, strict=True):
        if gradient is None:
            continue
        cast = gradient.to(ctx.choice.base)
        with ctx.choice.workspace.lock:
            weight = ctx.choice.workspace.weight(packed, state)
            found = cast @ weight if found is None else found.addmm_(cast, weight)
    assert found is not None, "one of them is not None"
    return found.to(ctx.dtype)


def _added(of_x: torch.Tensor, of_low: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return of_x.addmm_(of_low, a) if of_low.dtype == of_x.dtype else of_x.add_(of_low @ a)


def _rows(stacked: torch.Tensor, factors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows of each factor A."""
    return iter((stacked,) if len(factors) == 1 else torch.split(stacked, [a.shape[0] for a in factors]))
