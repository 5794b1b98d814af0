"""`peft.all-linear-of-experts`: experts are adapted as linear layers are, and what PEFT converts is said."""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.quantizers.stack import stacks_of

__all__ = ["spell_out"]

#: First names, beside the experts, of modules that choose among them.
ROUTERS = frozenset({"gate", "router"})


def _given(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def converted(convert: Callable[..., object]) -> Any:
    """The LoRA that `convert` of PEFT makes of one of all linear layers, of a tiny model with packed experts."""
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(1, 1, device="meta")
            self.experts = nn.Module()
            vars(self.experts)["packed_stacks"] = {"down_proj": None}

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            vars(self.config)["model_type"] = "qwen3_moe"
            self.block = Block()

    config = LoraConfig(r=1, target_modules="all-linear")
    convert(config, Model(), [])
    return config


def asked_otherwise() -> bool:
    """Whether PEFT adapts other parameters than those of the experts where all linear layers are asked for."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert

    return bool(converted(convert).target_parameters != {"experts.down_proj"})


def check_leaves_router() -> None:
    """Raise RuntimeError if the router is adapted, or packed experts are not."""
    found = converted(lambda *args: _converted(lambda *_args: None, args, {}))
    if found.target_modules != {"q_proj"} or found.target_parameters != {"experts.down_proj"}:
        raise RuntimeError(f"expected q_proj and down_proj to be adapted, found {found}")


@patches.register(
    "peft.all-linear-of-experts",
    target="peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
    reason=(
        "all-linear adapts the router too, and fused experts by twice the rank, in families for which PEFT has a "
        "table, and no experts at all in the others; nothing is said"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py",
    requires={"peft": ">=0.19,<0.22"},
    signature="(peft_config, model, conversions)",
    fingerprint=("4dfcb3da6f575392", "f294ca8f7dd9e8e8"),  # 0.19, since 0.20
    optional=True,  # PEFT 0.18 converts nothing
    on_unknown="skip",
    on_drift="skip",
    probe=asked_otherwise,
    verify=check_leaves_router,
    subject=lambda _instance, args, kwargs: _given("model", 1, args, kwargs),
)
def spell_out(wrapped: Callable[..., None], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Replace `all-linear`, for a model with packed experts, by the names of linear layers and experts.

    Not by the router, nor by what PEFT would take for the name of an expert's part, wherever it is read again. On every
    other model PEFT does what it does, and that is said.
    """
    _say(_converted(wrapped, args, kwargs))
    _say(_everywhere(_given("peft_config", 0, args, kwargs)))


def _converted(wrapped: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Convert the configuration; returns what is to be said of it."""
    config, model = _given("peft_config", 0, args, kwargs), _given("model", 1, args, kwargs)
    if not hasattr(config, "target_parameters"):  # a tuner other than LoRA, which adapts modules alone
        wrapped(*args, **kwargs)
        return ""
    asked = copy.deepcopy(config)
    experts = {_plain(fqn): module for fqn, module in model.named_modules() if stacks_of(module)}
    if experts and isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        return _spelled_out(config, model, experts)
    wrapped(*args, **kwargs)
    return _changes(asked, config)


def _spelled_out(config: Any, model: nn.Module, experts: Mapping[str, nn.Module]) -> str:
    """Change `config`; returns what is to be said of it."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    named: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
    linear = set(named.target_modules)
    beside = tuple(fqn.rpartition(".")[0] for fqn in experts)
    routers = {name for name in linear if any(_chooses(name, block) for block in beside)}
    taken = {name for name in linear - routers if name.rpartition(".")[2] in _taken_for_experts(model)}

    def is_asked(fqn: str) -> bool:
        alone = copy.copy(config)
        alone.target_modules = {fqn}
        return bool(check_target_module_exists(alone, fqn))

    held = [fqn for fqn in experts if is_asked(fqn)]
    prefixes = held if len(held) < len(experts) else {fqn.rpartition(".")[2] for fqn in held}
    names = {f"{prefix}.{name}" for prefix in prefixes for fqn in held for name in stacks_of(experts[fqn])}
    chosen = linear - routers - taken
    others = {fqn.rpartition(".")[2] for fqn, _ in model.named_modules() if fqn not in chosen}
    config.target_modules = {fqn if (leaf := fqn.rpartition(".")[2]) in others else leaf for fqn in chosen}
    config.target_parameters = {*(config.target_parameters or ()), *names}
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    left = (
        f" {', '.join(sorted({_short(name) for name in taken}))} neither, which PEFT would read as experts."
        if taken
        else ""
    )
    named = ", ".join(sorted(names)) or "none: they are excluded"
    apart = ", but for those of rank_pattern" if config.rank_pattern else ""
    return (
        f"all-linear adapts linear layers ({', '.join(leaves)}) and experts ({named}), all at rank {config.r}{apart}; "
        f"not the router.{left} Other ranks: rank_pattern; other parameters: target_parameters=[...], with "
        "target_modules=[...] by name"
    )


def _chooses(name: str, block: str) -> bool:
    inside = name.removeprefix(f"{block}.") if block else name
    return (inside != name or not block) and inside.split(".")[0] in ROUTERS


def _taken_for_experts(model: nn.Module) -> Collection[str]:
    """Last names of modules that PEFT takes for parts of experts whenever it reads a configuration for this family."""
    from peft.utils import transformers_weight_conversion

    upstream: Any = transformers_weight_conversion
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names: dict[str, str] = upstream._MOE_TARGET_MODULE_MAPPING.get(upstream._MODEL_TO_CONVERSION_PATTERN.get(kind), {})
    return names.keys()


def _changes(asked: Any, made: Any) -> str:
    """Words for the parameters that PEFT has added to a configuration by itself; none if it has not."""
    new = sorted(set(made.target_parameters or ()) - set(asked.target_parameters or ()))
    if not new:
        return ""
    ranks = {
        name.rpartition(".")[2]: rank for name, rank in made.rank_pattern.items() if name not in asked.rank_pattern
    }
    adapted = [name for name in new if name.rpartition(".")[2] not in ranks]
    adapted += [f"{name} at rank {rank} instead of {made.r}" for name, rank in ranks.items()]
    return (
        f"PEFT takes a part of target_modules={asked.target_modules!r} for parameters of experts and routers, and "
        f"adapts {', '.join(adapted)}. To choose, name linear layers in target_modules, and target_parameters=[...]"
    )


def _everywhere(config: Any) -> str:
    """Words for `layers_to_transform` beside parameters that are named without a layer; none if it picks all."""
    layers = getattr(config, "layers_to_transform", None)
    names = sorted(
        name for name in getattr(config, "target_parameters", None) or () if not re.search(r"(^|\.)\d+\.", name)
    )
    if layers is None or not names:
        return ""
    return (
        f"layers_to_transform={layers} picks linear layers alone: PEFT adapts {', '.join(names)} of every layer. To "
        "choose, name the layers in target_parameters: ['layers.20.mlp.experts.down_proj']"
    )


@functools.cache  # once: adapters are tried on a copy before they are made
def _say(what: str) -> None:
    if what and os.environ.get("RANK", "0") == "0":
        logging.getLogger("surgery").warning("surgery: %s", what)


def _plain(fqn: str) -> str:
    return fqn.replace(".base_layer", "")


def _short(fqn: str) -> str:
    return ".".join(fqn.split(".")[-2:])
