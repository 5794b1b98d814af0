"""`bitsandbytes.linear4bit-apply`: `to_empty` and the like keep the packed weight of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...registry import REGISTRY
from ._packing import as_params4bit, is_quantized
from ._specimen import meta_linear4bit

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["keep_packed_weight"]


def to_empty_loses_class() -> bool:
    """Whether a packed weight on meta comes out of `to_empty` as a plain Parameter."""
    return not is_quantized(meta_linear4bit().to_empty(device="cpu").weight)


def check_keeps_packed_weight() -> None:
    """Raise RuntimeError if `to_empty` through the wrapper loses the class or the quant_state."""
    import torch

    layer = meta_linear4bit()

    def empty_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu")

    stock: Any = torch.nn.Module._apply
    keep_packed_weight(functools.partial(stock, layer), layer, (empty_on_cpu,), {})
    stored = layer._parameters["weight"]
    if stored is None or stored.is_meta or not is_quantized(stored):
        raise RuntimeError(f"expected a Params4bit with its quant_state on the CPU, found {stored!r}")


@REGISTRY.register(
    "bitsandbytes.linear4bit-apply",
    target="bitsandbytes.nn.modules:Linear4bit._apply",
    reason="to_empty turns a packed weight on meta into a plain Parameter without its quant_state",
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/pull/970",
    requires={"bitsandbytes": ">=0.43"},
    after=("torch.meta-param-replacement",),
    probe=to_empty_loses_class,
    verify=check_keeps_packed_weight,
)
def keep_packed_weight(
    wrapped: Callable[..., Linear4bit], instance: Linear4bit, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Linear4bit:
    """Make `Module._apply` of a Linear4bit leave a packed Params4bit with its quant_state as the stored weight.

    A meta weight of the logical shape is given the packed shape before memory is allocated for it. The
    quant_state is the weight's own, or else `module.quant_state`; it moves to the device to which the stock
    code moves it. A layer that is not quantized yet, and a weight that is an FSDP shard, are left to the stock
    code.
    """
    before = instance._parameters.get("weight")
    quant_state = _quant_state_of(instance, before)
    if before is None or quant_state is None:
        return wrapped(*args, **kwargs)
    as_params4bit(instance, before, quant_state)
    result = wrapped(*args, **kwargs)
    stored = instance._parameters["weight"]
    if stored is not None:
        as_params4bit(instance, stored, quant_state)
    return result


def _quant_state_of(module: Linear4bit, weight: torch.Tensor | None) -> QuantState | None:
    """The weight's own quant_state, or else the module's, which is stale after a merge by PEFT."""
    own = getattr(weight, "quant_state", None)
    return own if own is not None else getattr(module, "quant_state", None)
