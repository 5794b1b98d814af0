"""`bitsandbytes.params4bit-to-meta`: a packed weight moved to meta leaves its quant_state behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...registry import REGISTRY
from ._specimen import packed_linear4bit

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Params4bit

__all__ = ["keep_quant_state"]


def to_meta_moves_quant_state() -> bool:
    """Whether moving the weight to meta moves the quant_state, which the original still uses."""
    layer = packed_linear4bit()
    layer.weight.to("meta")
    return bool(layer.quant_state.absmax.is_meta)


def check_keeps_quant_state() -> None:
    """Raise RuntimeError if the wrapper moves the quant_state, or makes a weight without it."""
    layer = packed_linear4bit()
    moved = keep_quant_state(layer.weight.to, layer.weight, ("meta",), {})
    if not moved.is_meta or moved.quant_state is not layer.quant_state or layer.quant_state.absmax.is_meta:
        raise RuntimeError("Params4bit.to('meta') did not give a meta weight that shares an untouched quant_state")


@REGISTRY.register(
    "bitsandbytes.params4bit-to-meta",
    target="bitsandbytes.nn.modules:Params4bit.to",
    reason=(
        "Params4bit.to('meta') moves the quant_state, which the original shares, to meta in place, "
        "where its values are lost"
    ),
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py",
    requires={"bitsandbytes": ">=0.43"},
    probe=to_meta_moves_quant_state,
    verify=check_keeps_quant_state,
)
def keep_quant_state(
    wrapped: Callable[..., Params4bit], instance: Params4bit, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Params4bit:
    """Make `Params4bit.to("meta")` return a meta Params4bit with all attributes of the original, including the
    same quant_state.

    The original and the quant_state are not touched. Moves to other devices, and casts, are stock.
    """
    import torch

    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if getattr(device, "type", None) != "meta":  # None for a mere cast, which the annotations omit
        return wrapped(*args, **kwargs)
    # Not made with Params4bit(...), whose constructor refuses unknown attributes before 0.50.
    data = torch.empty_like(instance.data, device="meta", dtype=dtype)
    moved = torch.Tensor._make_subclass(type(instance), data, instance.requires_grad)
    vars(moved).update(vars(instance))
    return moved
