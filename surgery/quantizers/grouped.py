"""The forward of experts in 4 bits: grouped products that dequantize a few experts at a time, and LoRA beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from surgery.quantizers.base import STATISTICS
from surgery.quantizers.stack import PackedStack, check_not_cast, stacks_of

__all__ = ["DEQUANTIZED_BYTES", "SplitLora", "experts_forward", "grouped_mm_4bit"]

#: Bytes of dequantized values that there are at once; of one expert at least.
DEQUANTIZED_BYTES = 256 << 20

#: Bytes of experts without rows that a GPU dequantizes in less time than it takes to start another run.
GAP_BYTES = 64 << 20

#: Bytes that strides of operands of a grouped product are multiples of.
STRIDE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class SplitLora:
    """One LoRA adapter of one parameter of an experts module, as its two factors, in PEFT's layout.

    parameter: the name of the parameter. a: `(rank * experts, in)`, all rows of an expert together. b:
    `(out, rank * experts)`, all experts of a rank together. dropout: applied to what the adapter is given, or None.
    """

    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: nn.Module | None = None


class _Rows(NamedTuple):
    """Rows sorted by expert: the expert of each, where those of each expert end, on the device and on the CPU.

    outside: whether a row is of none of these experts, `(rows, 1)`; such rows are last. None if there can be none.
    """

    experts: torch.Tensor
    offsets: torch.Tensor
    ends: torch.Tensor
    outside: torch.Tensor | None


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    lora: Sequence[SplitLora] = (),
) -> torch.Tensor:
    """The forward of an experts module of transformers, as its `grouped_mm_experts_forward`, operation for operation.

    self: a module with `packed_stacks`, in `quant_storage`; parameters that are not among them are used as they are.
    hidden_states: `(tokens, hidden)`. top_k_index, top_k_weights: `(tokens, k)`. Returns `(tokens, hidden)`.
    """
    top_k = top_k_index.size(-1)
    experts, order = torch.sort(top_k_index.reshape(-1))
    hidden = hidden_states[order // top_k]
    rows = _sorted_rows(self, experts)
    if rows.outside is not None:
        hidden.masked_fill_(rows.outside, 0.0)  # keeps what backward does not write out of the gradient
    hidden = _projected(self, "gate_up_proj" if self.has_gate else "up_proj", hidden, rows, lora)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    hidden = _projected(self, "down_proj", hidden, rows, lora)
    if getattr(self, "has_post_expert_norm", False):  # older releases have no such experts
        hidden = self.post_expert_norm(hidden)
    weighted = hidden * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.size(0), device=order.device)
    summed = weighted[back].view(*top_k_index.shape, hidden_states.size(-1)).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _sorted_rows(module: Any, experts: torch.Tensor) -> _Rows:
    counted = experts.float() if experts.device.type == "cpu" else experts.int()  # what histc takes
    counts = torch.histc(counted, bins=module.num_experts, min=0, max=module.num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    outside = None
    if getattr(module, "_is_expert_parallel", True):  # older releases do not tell
        outside = (experts >= module.num_experts).unsqueeze(-1)
        experts.clamp_(max=module.num_experts - 1)
    return _Rows(experts, offsets, offsets.to("cpu"), outside)  # the one time that the device is waited for


def _projected(module: Any, name: str, x: torch.Tensor, rows: _Rows, lora: Sequence[SplitLora]) -> torch.Tensor:
    """The product of each row with its expert's weight called `name`, with its bias and its LoRA."""
    from transformers.integrations.moe import _grouped_linear

    weight, stack = getattr(module, name), stacks_of(module).get(name)
    if stack is None:
        y = _grouped_linear(x, weight, rows.offsets, is_transposed=module.is_transposed)
    else:
        statistics = getattr(module, name + STATISTICS)
        check_not_cast(module, weight, statistics)
        y = _packed_product(x, weight, statistics, rows, stack, is_transposed=module.is_transposed)
    if module.has_bias:
        y.add_(getattr(module, f"{name}_bias")[rows.experts])
    for each in lora:
        if each.parameter == name:
            y.add_(_low_rank(each, x, rows.offsets, y.dtype))
    return y if rows.outside is None else y.masked_fill(rows.outside, 0.0)


def _packed_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    statistics: torch.Tensor,
    rows: _Rows,
    stack: PackedStack,
    *,
    is_transposed: bool,
) -> torch.Tensor:
    """The product in the dtype of the weights, whatever autocast says: so stock's grouped product is."""
    y: torch.Tensor = grouped_mm_4bit(
        x.to(stack.dtype),
        packed,
        statistics,
        rows.offsets,
        rows.ends,
        list(stack.shape),
        stack.quant_type,
        stack.blocksize,
        stack.double_quant,
        is_transposed,
    )
    return y


def _low_rank(lora: SplitLora, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scaling * (x A^T) B^T` of each row with its expert's factors, in `dtype`: PEFT's `ParamWrapper` casts them."""
    from transformers.integrations.moe import _grouped_linear

    experts = offsets.size(0)
    rank = lora.a.size(0) // experts
    a = (lora.a * lora.scaling).to(dtype).reshape(experts, rank, -1)  # not the product, which may be in 16 bits
    b = lora.b.to(dtype).reshape(-1, rank, experts).permute(2, 0, 1)
    missing = -rank % (STRIDE_BYTES // dtype.itemsize)
    if missing:
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    x = x if lora.dropout is None else lora.dropout(x)
    # Inductor gives a plain copy the strides of what it copies, which a grouped product refuses.
    b = contiguous(b) if torch.compiler.is_compiling() else b.contiguous()
    return _grouped_linear(_grouped_linear(x, a, offsets), b, offsets)


@torch.library.custom_op("surgery::contiguous", mutates_args=())
def contiguous(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of `x`, in compiled code too."""
    return x.clone(memory_format=torch.contiguous_format)


@contiguous.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


contiguous.register_autograd(lambda _ctx, gradient: gradient)


@torch.library.custom_op("surgery::grouped_mm_4bit", mutates_args=())
def grouped_mm_4bit(  # noqa: PLR0917 - arguments of an operator are positional
    x: torch.Tensor,
    packed: torch.Tensor,
    statistics: torch.Tensor,
    offsets: torch.Tensor,
    ends: torch.Tensor,
    shape: Sequence[int],
    quant_type: str,
    blocksize: int,
    double_quant: bool,  # noqa: FBT001
    is_transposed: bool,  # noqa: FBT001
) -> torch.Tensor:
    """The product of each row of `x` with the weight of its expert, dequantized for as long as that takes.

    x: `(rows, in)`, sorted by expert, in the dtype of the values. packed, statistics: as `PackedStack` has them.
    offsets: int32 `(experts,)`, the first row after those of each expert; ends: the same on the CPU. shape: of one
    expert's weight, `(out, in)`, or `(in, out)` if `is_transposed`. Returns `(rows, out)`, zeros after the last end.
    """
    from transformers.integrations.moe import _grouped_linear

    stack = PackedStack(
        experts=ends.size(0),
        shape=(shape[0], shape[1]),
        quant_type=quant_type,
        blocksize=blocksize,
        double_quant=double_quant,
        dtype=x.dtype,
    )
    found = ends.tolist()
    y = x.new_empty(x.size(0), shape[1] if is_transposed else shape[0])
    y[found[-1] :].zero_()
    each = stack.numel * x.element_size()
    gap = GAP_BYTES // each if x.is_cuda else 0
    for experts in _runs(found, max(1, DEQUANTIZED_BYTES // each), gap):
        start = found[experts.start - 1] if experts.start else 0
        rows = slice(start, found[experts.stop - 1])
        run_ends = offsets[experts.start : experts.stop] - start
        weight = stack.dequantize(packed, statistics, experts)
        y[rows] = _grouped_linear(x[rows], weight, run_ends, is_transposed=is_transposed)
        del weight  # before the next run is dequantized
    return y


def _runs(ends: Sequence[int], most: int, gap: int) -> Iterator[range]:
    """Runs of at most so many consecutive experts, in which at most `gap` experts on end have no rows."""
    run = range(0)
    for expert, end in enumerate(ends):
        if end == (ends[expert - 1] if expert else 0):
            continue
        if run and (expert - run.stop > gap or expert + 1 - run.start > most):
            yield run
            run = range(0)
        run = range(run.start if run else expert, expert + 1)
    if run:
        yield run


@grouped_mm_4bit.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    shape, is_transposed = args[4], args[-1]
    return x.new_empty(x.size(0), shape[1] if is_transposed else shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    """Save what is there in any case: neither rows nor dequantized weights."""
    _x, *tensors = inputs[:5]
    ctx.save_for_backward(*tensors)
    ctx.settings = inputs[5:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient of the rows: the product with the transposed weights, which are dequantized again."""
    *settings, is_transposed = ctx.settings
    tensors = ctx.saved_tensors  # once: a checkpoint gives them no second time
    of_rows = grouped_mm_4bit(gradient.contiguous(), *tensors, *settings, not is_transposed)
    return of_rows, *[None] * (len(tensors) + len(ctx.settings))


grouped_mm_4bit.register_autograd(_backward, setup_context=_save)
