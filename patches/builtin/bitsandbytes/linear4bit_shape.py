"""`bitsandbytes.linear4bit-shape`: the weight of a quantized Linear4bit reads as a Params4bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...registry import REGISTRY
from ..torch.fsdp1_raw_reads import reading_raw
from ._packing import as_params4bit, is_quantized, packed_shape
from ._specimen import packed_linear4bit

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["read_as_params4bit"]


def weight_loses_its_class() -> bool:
    """Whether a plain Parameter, stored in place of the packed weight, reads as a plain Parameter."""
    from torch import nn

    layer = packed_linear4bit()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return not is_quantized(layer.weight)


def check_reads_as_params4bit() -> None:
    """Raise RuntimeError if a plain packed tensor, or a meta weight of logical shape, is not restored."""
    import torch

    layer = packed_linear4bit()
    packed = layer.weight.data.clone()
    logical = torch.nn.Parameter(torch.empty(64, 64, device="meta"), requires_grad=False)
    for stored in (packed, logical):
        weight: Any = read_as_params4bit(functools.partial(_identity, stored), layer, (), {})
        expected = packed_shape(layer.quant_state, torch.bfloat16)
        if not is_quantized(weight) or tuple(weight.shape) != expected:
            raise RuntimeError(
                f"expected a Params4bit of shape {expected} with its quant_state, "
                f"found a {type(weight).__name__} of shape {tuple(weight.shape)}"
            )


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@REGISTRY.register(
    "bitsandbytes.linear4bit-shape",
    kind="attribute",
    target="bitsandbytes.nn.modules:Linear4bit.weight",
    reason=(
        "construction on meta, to_empty, and FSDP's flattening and unsharding leave a weight without its "
        "packed shape, its class or its quant_state; state_dict, PEFT's merge and dequantization need all"
    ),
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/pull/970",
    requires={"bitsandbytes": ">=0.43"},
    needs=("bitsandbytes.linear4bit-apply", "torch.fsdp1-raw-reads"),
    probe=weight_loses_its_class,
    verify=check_reads_as_params4bit,
)
def read_as_params4bit(
    wrapped: Callable[[], torch.Tensor | None],
    instance: Linear4bit,
    _args: tuple[()],
    _kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Read `module.weight` as a Params4bit if `module.quant_state` is set.

    A tensor of the packed shape, `((numel + 1) // (2 * itemsize), 1)`, reads as a Params4bit with
    `module.quant_state`, over the same memory; a meta tensor of the logical shape `(out, in)` is first given
    the packed shape, and stored so. A Parameter is converted in place, for good; for a plain tensor, each read
    makes a new Params4bit. Everything else is returned unchanged: a Params4bit that has its quant_state, a
    DTensor, FSDP1's one-dimensional shard, and any weight of a module that is not quantized. When FSDP1 itself
    reads, to compare the plain tensor that it stored, it gets that tensor.
    """
    import torch

    stored = wrapped()
    quant_state = getattr(instance, "quant_state", None)
    if stored is None or quant_state is None:
        return stored
    if reading_raw() and type(stored) is torch.Tensor:
        return stored
    return as_params4bit(instance, stored, quant_state)
