"""`bitsandbytes.no-rewrap`: forward recovers a lost quant_state without replacing `module.weight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY
from ._specimen import packed_linear4bit

__all__ = ["recover_in_place"]


def recovery_replaces_weight() -> bool:
    """Whether recovering the quant_state of a plain Parameter replaces the Parameter."""
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module as recover
    from torch import nn

    layer = packed_linear4bit()
    layer.weight = before = nn.Parameter(layer.weight.data, requires_grad=False)
    recover(layer)
    return layer._parameters["weight"] is not before


def check_recovers_in_place() -> None:
    """Raise RuntimeError if the wrapper replaces the weight, or leaves it without its quant_state."""
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module as recover
    from torch import nn

    layer = packed_linear4bit()
    layer.weight = before = nn.Parameter(layer.weight.data, requires_grad=False)
    recover_in_place(recover, None, (layer,), {})
    recovered = getattr(before, "quant_state", None) is layer.quant_state
    if layer._parameters["weight"] is not before or not recovered:
        raise RuntimeError("recovering the quant_state replaced module.weight, or did not set its quant_state")


def _module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["module"]


@REGISTRY.register(
    "bitsandbytes.no-rewrap",
    target="bitsandbytes.nn.modules:fix_4bit_weight_quant_state_from_module",
    reason=(
        "forward recovers a lost quant_state by registering a new Params4bit: FSDP1 refuses it under "
        "SHARD_GRAD_OP with use_orig_params=True, and model.parameters() grows"
    ),
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py",
    requires={"bitsandbytes": ">=0.44"},
    signature="(module)",  # no fingerprint: 0.50 changed the source, to log a warning instead of issuing it
    subject=lambda _instance, args, kwargs: _module(args, kwargs),
    probe=recovery_replaces_weight,
    verify=check_recovers_in_place,
)
def recover_in_place(
    wrapped: Callable[..., None], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Set `module.quant_state`, and its blocksize, on a stored weight that has no quant_state.

    `module` is a Linear4bit or Embedding4bit. A module without a quant_state, and a weight that does not have
    the packed shape, get the stock warning and error.
    """
    module = _module(args, kwargs)
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    quant_state = getattr(module, "quant_state", None)
    if quant_state is None or weight.shape[1:] != (1,):
        wrapped(*args, **kwargs)
        return
    weight.quant_state = quant_state
    weight.blocksize = quant_state.blocksize  # Embedding4bit reads it from the weight
