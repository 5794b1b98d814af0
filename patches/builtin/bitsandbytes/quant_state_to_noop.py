"""`bitsandbytes.quant-state-to-noop`: the given quant states stay on their device while PEFT rebuilds a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY
from ._specimen import meta_linear4bit, packed_linear4bit

__all__ = ["stay_put"]


def peft_sends_quant_state_to_meta() -> bool:
    """Whether `get_peft_model`, on a model with a 4-bit weight on meta, also moves the quant_state to meta.

    The trigger is in PEFT and the cause in bitsandbytes, so it can only be determined by trying.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=()):  # adapters are initialized at random
        return sends_quant_state_to_meta(lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["proj"])))


def sends_quant_state_to_meta(rebuild: Callable[[Any], object]) -> bool:
    """Whether `rebuild`, given a model with a 4-bit layer `proj` on meta, moves its quant_state to meta."""
    from torch import nn

    model: Any = nn.Module()
    model.config = {"model_type": "custom"}  # PEFT reads this from a transformers model
    model.is_loaded_in_4bit = True
    model.proj = meta_linear4bit()
    quant_state = model.proj.quant_state
    rebuild(model)
    return bool(quant_state.absmax.is_meta)


def check_stays_put() -> None:
    """Raise RuntimeError if the wrapper moves a quant_state."""
    quant_state = packed_linear4bit().quant_state
    stay_put(quant_state.to, quant_state, ("meta",), {})
    if quant_state.absmax.is_meta:
        raise RuntimeError("QuantState.to moved a quant_state that was to stay where it is")


@REGISTRY.register(
    "bitsandbytes.quant-state-to-noop",
    target="bitsandbytes.functional:QuantState.to",
    reason="get_peft_model moves the quant_state of a meta 4-bit weight to meta, in place, and loses it",
    upstream="https://github.com/AnswerDotAI/fsdp_qlora/pull/4",
    requires={"peft": ">=0.7.0,<0.12", "bitsandbytes": ">=0.43"},
    probe=peft_sends_quant_state_to_meta,
    verify=check_stays_put,
)
def stay_put(_wrapped: Callable[..., None], _instance: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    """Make `QuantState.to` do nothing, for any arguments.

    To be limited to the quant states of one model (`patches.on`), and only while PEFT rebuilds it: a model that
    moves between devices needs the stock behaviour.
    """
