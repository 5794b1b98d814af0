"""Adapters added through PEFT, on whatever device the base weights are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import model_surgery_patches as patches
from surgery.model.tree import convert, modules_of
from surgery.quantizers.base import QuantFormat, format_of
from surgery.quantizers.stack import stacks_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = [
    "PLAIN",
    "adapted_by_peft",
    "adapting",
    "appearing_real",
    "drawing_from",
    "draws_later",
    "leaving_blank",
    "needs_weights",
    "patches_of_experts",
]

#: Options of LoRA that change nothing about how adapters get their initial values: random ones, or zeros.
PLAIN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "use_rslora",
})  # fmt: skip

#: Values of `init_lora_weights` that are drawn at random, without a look at anything.
RANDOM = (True, False, "gaussian")


#: The patch by which it is said what all-linear adapts beside linear layers.
ALL_LINEAR = "peft.all-linear-of-experts"


def patches_of_experts(model: nn.Module) -> tuple[str, ...]:
    """Patches by which PEFT adapts packed experts in `model`, and does not merge them; none if there are none."""
    if not any(map(stacks_of, modules_of(model))):
        return ()
    return (ALL_LINEAR, "peft.lora-of-packed-experts", "peft.no-merge-of-packed-experts")


def needs_weights(lora: LoraConfig) -> bool:
    """Whether PEFT reads base weights to make these adapters, so that the model cannot be adapted on meta."""
    names = ("use_dora", "modules_to_save", "trainable_token_indices")
    return any(getattr(lora, name, None) for name in names)


def draws_later(lora: LoraConfig) -> bool:
    """Whether initial values can be drawn after PEFT has built the adapters: no option set may depend on them."""
    default = type(lora)()
    others = [name for name in vars(lora) if name not in PLAIN and vars(lora)[name] != vars(default).get(name)]
    return lora.init_lora_weights in RANDOM and not others


@contextlib.contextmanager
def drawing_from(rng_state: torch.Tensor) -> Iterator[None]:
    """A block in which torch's CPU generator goes on from `rng_state`.

    If that is its own state, it goes on from there after the block too; otherwise it is as it was.
    """
    own = torch.get_rng_state()
    if torch.equal(own, rng_state):
        yield
        return
    torch.set_rng_state(rng_state)
    try:
        yield
    finally:
        torch.set_rng_state(own)


@contextlib.contextmanager
def appearing_real(model: nn.Module) -> Iterator[None]:
    """A block in which every parameter on meta looks as if it were on the CPU, and a sharded one whole, in no memory.

    PEFT moves a new adapter to the device of its base weight; on meta its initial values would be lost. What it takes
    from base weights is NaN, for the pass `derive` to find; of packed weights if `leaving_blank`.
    """
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules_of(model):
        like = (format_of(module) or QuantFormat).like
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter.is_meta or isinstance(parameter, DTensor)):
                if parameter not in stand_ins:
                    device = "cpu" if parameter.is_meta else parameter.device
                    # One element in memory, shown as often as the shape says.
                    blank = torch.nan if parameter.is_floating_point() else 0
                    element = torch.full((1,), blank, dtype=parameter.dtype, device=device)
                    stand_ins[parameter] = like(parameter, element.expand(parameter.shape))
                module._parameters[name] = stand_ins[parameter]
    originals = {stand_in: parameter for parameter, stand_in in stand_ins.items()}
    try:
        yield
    finally:
        for module in modules_of(model):
            for name, found in module._parameters.items():
                if found is not None and found in originals:
                    originals[found].requires_grad = found.requires_grad
                    module._parameters[name] = originals[found]


def leaving_blank(loras: Iterable[LoraConfig]) -> contextlib.AbstractContextManager[object]:
    """A block in which magnitudes of DoRA are NaN where base weights have no values, if one of `loras` has any."""
    if not any(getattr(lora, "use_dora", False) for lora in loras):
        return contextlib.nullcontext()
    return patches.transaction("peft.dora-of-blank-weights", reason="a model is adapted before it has weights")


def adapting(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """A block in which PEFT adapts packed experts of `model`, and what all-linear adapts is said.

    Outside of blocks that write down what is drawn: patches are tried as they are applied.
    """
    needed = dict.fromkeys((ALL_LINEAR, *patches_of_experts(model)))
    return patches.transaction(*needed, reason="experts of a model are adapted")


def adapted_by_peft(model: nn.Module, lora: LoraConfig, dtype: torch.dtype) -> PeftModel:
    """Adapt `model` as `peft.get_peft_model` does, with all that is trainable in `dtype`; `lora` stays as it is.

    Copies that PEFT makes of whole modules keep the dtypes of those.
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, copy.deepcopy(lora), autocast_adapter_dtype=False)
    saved = [module._modules.get("modules_to_save") for module in adapted.modules()]
    copies = {parameter for module in saved if module is not None for parameter in module.parameters()}
    convert([p for p in adapted.parameters() if p.requires_grad and p not in copies], dtype=dtype)
    return adapted
