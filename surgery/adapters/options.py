"""Options of adapters that cannot work here, and names in them that match nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.adapters.attach import PLAIN
from surgery.errors import ConfigError, SelectorError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["OPTIONS", "check_adapter", "check_built", "check_modules", "unknown_targets"]

#: Values of `init_lora_weights` that do not look at the base weight in full precision, which 4 bits do not hold.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")

#: Beginnings of those that take out of the base weight what they put into the adapter.
CHANGING_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")

#: Options of `LoraConfig` that may differ from their default.
OPTIONS = PLAIN | {
    "_custom_modules", "alora_invocation_tokens", "ensure_weight_tying", "modules_to_save", "target_parameters",
    "trainable_token_indices", "use_dora",
}  # fmt: skip


def check_adapter(lora: Any) -> None:
    """Raise `ConfigError` for what is no LoRA, and for options of LoRA that cannot work in any sharding."""
    from peft import LoraConfig

    if not isinstance(lora, LoraConfig) or getattr(lora.peft_type, "value", lora.peft_type) != "LORA":
        found = type(lora).__name__ + (f" of {len(lora)}" if isinstance(lora, (dict, list, tuple)) else "")
        raise ConfigError(
            f"lora: expected one peft.LoraConfig, found {found}. Other methods of PEFT, and several adapters in one "
            "model, are not supported: use a LoraConfig"
        )
    _check_options(lora)


def _check_initialization(init: Any) -> None:
    known = init.lower() if isinstance(init, str) else init
    if isinstance(known, str) and known.startswith(CHANGING_BASE):
        raise ConfigError(
            f"init_lora_weights={init!r} takes out of the unquantized base weight what it puts into the adapter, which "
            "then fits that base alone, saved nowhere, and not the checkpoint's: let PEFT initialize the 16-bit model, "
            "save what its unload() returns, and train that checkpoint with the adapter that was made; or use "
            "init_lora_weights=True or 'gaussian'"
        )
    if known not in INITIALIZATIONS:
        raise ConfigError(
            f"init_lora_weights={init!r} derives the adapter from the unquantized base weight, which is not kept: "
            "initialize from the 16-bit model first, or use init_lora_weights=True or 'gaussian'"
        )


def _check_options(lora: Any) -> None:
    _check_initialization(lora.init_lora_weights)
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


Matches = Callable[[str, str], bool]


def check_modules(model: nn.Module, lora: LoraConfig) -> None:
    """Raise `SelectorError` for names of `exclude_modules`, `modules_to_save` and token indices that match nothing."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    excluded: Any = lora.exclude_modules or ()
    _refuse("exclude_modules", _unmatched(excluded, names, _is_module), names)
    _refuse("modules_to_save", _unmatched(lora.modules_to_save or (), names, str.endswith), names)
    indices: Any = getattr(lora, "trainable_token_indices", None) or {}
    if isinstance(indices, dict):
        _refuse("trainable_token_indices", _unmatched(indices, names, str.endswith), names)


def unknown_targets(model: nn.Module, lora: LoraConfig) -> list[str]:
    """Those of `target_modules` that match no module; the whole regular expression if it is one."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    wanted: Any = lora.target_modules
    if wanted is None and not getattr(lora, "target_parameters", None):
        wanted = set(DEFAULTS.get(getattr(getattr(model, "config", None), "model_type", ""), ())) or {"nothing"}
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return []
    return _unmatched(wanted or (), [name for name, _ in model.named_modules() if name], _is_module)


def check_built(model: nn.Module, lora: LoraConfig, adapted: PeftModel, unknown: Sequence[str]) -> None:
    """Raise `SelectorError` for names that PEFT has made nothing of, and `ConfigError` for tokens that are not there.

    adapted: of a model like `model`. unknown: targets that match no module; PEFT takes some for parameters.
    """
    made: Any = adapted.peft_config["default"]
    tuner: Any = adapted.base_model
    wanted = set(getattr(lora, "target_parameters", None) or ())
    translated = set(getattr(made, "target_parameters", None) or ()) - wanted
    left = made.target_modules if isinstance(made.target_modules, (set, list)) else ()
    lost = [name for name in unknown if not translated or name in left]
    if not isinstance(lora.target_modules, str):
        check_targets(model, lost)
    parameters = list(getattr(tuner, "targeted_parameter_names", ()))
    every = [name for name, _ in model.named_parameters()]
    _refuse("target_parameters", _unmatched(wanted, parameters, _is_module), every)
    targets = [*tuner.targeted_module_names, *parameters]
    targets += [name.rpartition(".")[0] for name in parameters]
    for option in ("rank_pattern", "alpha_pattern"):
        _refuse(option, _unmatched(getattr(lora, option) or (), targets, _is_pattern), targets)
        _check_order(option, getattr(made, option) or {}, targets)
    _refuse("layers_to_transform", list(_unused_layers(lora, targets)), targets)
    _check_tokens(adapted)


def check_targets(model: nn.Module, lost: Sequence[str]) -> None:
    """Raise `SelectorError` if there are `lost` targets, which match no module of `model`."""
    if not lost:
        return
    leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")})
    raise SelectorError(
        f"lora.target_modules: {', '.join(map(repr, sorted(lost)))} matches no module of {type(model).__name__}. "
        f"Modules with weights are called: {', '.join(leaves)}",
        patterns=sorted(lost),
    )


def _unmatched(wanted: str | Iterable[str], names: Sequence[str], matches: Matches) -> list[str]:
    """Those of `wanted` that match none of `names`; a string is a regular expression."""
    if isinstance(wanted, str):
        return [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
    return [each for each in wanted if not any(matches(name, each) for name in names)]


def _is_module(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _is_pattern(name: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_order(option: str, patterns: dict[str, Any], targets: Sequence[str]) -> None:
    """Refuse patterns whose order counts: PEFT takes the first that matches, and sorts them when it saves them."""
    for name in targets:
        found = [pattern for pattern in patterns if _is_pattern(name, pattern)]
        if found and patterns[found[0]] != patterns[min(found)]:
            raise ConfigError(
                f"lora.{option}: {found[0]!r} and {min(found)!r} both match {name}, with different values, and PEFT "
                "would take the other one when it loads the adapter again: use patterns of which one matches"
            )


def _unused_layers(lora: LoraConfig, targets: Sequence[str]) -> Iterator[str]:
    asked: Any = lora.layers_to_transform
    patterns: Any = lora.layers_pattern or r"[^.]+"
    names = "|".join([patterns] if isinstance(patterns, str) else patterns)
    for number in [] if asked is None else [asked] if isinstance(asked, int) else asked:
        if not any(re.search(rf"(^|\.)({names})\.{number}\.", name) for name in targets):
            yield str(number)


def _refuse(option: str, lost: Sequence[str], names: Sequence[str]) -> None:
    if not lost:
        return
    known = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    raise SelectorError(
        f"lora.{option}: {', '.join(map(repr, lost))} matches nothing that could be adapted. There are: {shown}",
        patterns=lost,
    )


def _check_tokens(adapted: PeftModel) -> None:
    for name, layer in adapted.named_modules():
        held: Any = getattr(layer, "token_indices", None)
        if not isinstance(held, dict):
            continue
        if not isinstance(layer.get_base_layer(), (nn.Embedding, nn.Linear)):
            raise ConfigError(
                f"lora.trainable_token_indices: {_plain(name)} is not a plain embedding or linear layer, or is in "
                "modules_to_save too, which PEFT cannot run: leave it out of one of them"
            )
        rows = layer.get_base_layer().weight.shape[0]
        beyond = sorted({index for each in held.values() for index in each if not 0 <= index < rows})
        if beyond:
            raise ConfigError(
                f"lora.trainable_token_indices: {', '.join(map(str, beyond[:8]))} is no row of {_plain(name)}, which "
                f"has {rows}: use indices from 0 to {rows - 1}"
            )


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".token_adapter")
