"""Options of adapters that cannot work here, refused by name before anything is opened."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from surgery.config import FSDP1, FSDP2, Placement
from surgery.errors import ConfigError
from surgery.passes.adapt import PLAIN

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["INITIALIZATIONS", "OPTIONS", "check_adapter"]

#: Values of `init_lora_weights` that do not look at the base weight in full precision, which 4 bits do not hold.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")

#: Options of `LoraConfig` that may differ from their default.
OPTIONS = PLAIN | {
    "_custom_modules",
    "alora_invocation_tokens",
    "ensure_weight_tying",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
}

#: Options that read base weights while they are made, and what for.
READS = {
    "use_dora": "computes its magnitudes from the base weight",
    "trainable_token_indices": "starts from rows of the embedding",
}


def check_adapter(lora: LoraConfig | None, placement: Placement, shard: FSDP1 | FSDP2 | None, world_size: int) -> None:
    """Raise `ConfigError` for what is no LoRA, and for options of LoRA that cannot work in this sharding."""
    if lora is None:
        return
    _check_kind(lora)
    _check_options(lora)
    if placement == "sharded":
        _check_sharded(lora)
    if lora.use_dora and placement == "rank0-cpu" and world_size > 1:
        raise ConfigError(
            "use_dora=True computes its magnitudes from the base weight, which ranks other than 0 hold on meta under "
            "placement rank0-cpu: use placement='replicated', or use_dora=False"
        )
    if isinstance(shard, FSDP1) and not shard.use_orig_params:
        _check_units(lora)


def _check_kind(lora: Any) -> None:
    from peft import LoraConfig

    if isinstance(lora, LoraConfig) and getattr(lora.peft_type, "value", lora.peft_type) == "LORA":
        return
    found = type(lora).__name__
    raise ConfigError(
        f"lora: expected one peft.LoraConfig, found {found}"
        + (f" of {len(lora)}" if isinstance(lora, (dict, list, tuple)) else "")
        + ". Other methods of PEFT, and several adapters in one model, are not supported: use a LoraConfig"
    )


def _check_options(lora: Any) -> None:
    init = lora.init_lora_weights
    known = init.lower() if isinstance(init, str) else init
    if known not in INITIALIZATIONS:
        raise ConfigError(
            f"init_lora_weights={init!r} derives the adapter from the unquantized base weight, which is not kept: "
            "initialize from the 16-bit model first, or use init_lora_weights=True or 'gaussian'"
        )
    if isinstance(lora.modules_to_save, str):
        raise ConfigError(
            f"modules_to_save={lora.modules_to_save!r}: expected a list of names, found a text, whose letters PEFT "
            f"would take for names: use [{lora.modules_to_save!r}]"
        )
    default = type(lora)()
    for name, value in vars(lora).items():
        if name not in OPTIONS and value != vars(default).get(name):
            raise ConfigError(
                f"{name}={value!r} of {type(lora).__name__} is not supported: leave it at its default, "
                f"{vars(default).get(name)!r}"
            )
    numbers = {"lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout, **(lora.alpha_pattern or {})}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ConfigError(f"{name}={value!r}: expected a finite number, since adapters would be NaN or infinite")
    if lora.inference_mode:
        raise ConfigError("inference_mode=True leaves nothing to train: use inference_mode=False")


def _check_sharded(lora: LoraConfig) -> None:
    """With placement sharded the model is adapted before any rank has a weight, and none ever has a whole one."""
    for name, what in READS.items():
        if getattr(lora, name, None):
            raise ConfigError(
                f"{name} {what}, but with placement sharded no rank holds a whole weight: use placement='replicated', "
                f"or leave {name} out"
            )


def _check_units(lora: LoraConfig) -> None:
    """Without `use_orig_params` adapters are FSDP1 units of their own, and base weights are freed when these run."""
    for name in READS:
        if getattr(lora, name, None):
            raise ConfigError(
                f"{name} reads the base weight while the adapter runs, but without use_orig_params adapters are FSDP1 "
                f"units of their own, and the weight is freed by then: use use_orig_params=True, or leave {name} out"
            )
