"""Options of adapters that cannot work here, refused by name before anything is opened."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from surgery.adapters.attach import PLAIN
from surgery.errors import ConfigError

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


def check_adapter(lora: LoraConfig) -> None:
    """Raise `ConfigError` for what is no LoRA, and for options of LoRA that cannot work in any sharding."""
    _check_kind(lora)
    _check_options(lora)


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
