"""Adapters tried on a copy of the model on meta, before a weight is read: built, divided into units, and saved."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.adapters.alike import alike_blocks, is_uniform
from surgery.adapters.attach import adapted_by_peft, adapting
from surgery.adapters.options import check_built, check_modules, check_targets, unknown_targets
from surgery.adapters.save import by_peft_key
from surgery.errors import ConfigError
from surgery.model.fqn import PEFT_PREFIX, join
from surgery.model.tree import Site, decoder_blocks
from surgery.model.twin import twin_of
from surgery.quantizers.base import STATISTICS, QuantFormat, kept_parameters
from surgery.quantizers.stack import stacks_of
from surgery.sharding.base import ShardStrategy

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from surgery.adapters.saved import SavedAdapter

__all__ = ["Trained", "check_quantized", "rehearse"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parameter that will be trained. fqn: in the base model, with PEFT's names below the module that is adapted.

    is_base: whether it is one of the checkpoint's, trained in place, and `fqn` its name there.
    """

    fqn: str
    shape: torch.Size
    is_base: bool


def rehearse(
    model: nn.Module,
    lora: LoraConfig,
    *,
    quantized: Mapping[nn.Module, QuantFormat],
    quant: QuantFormat,
    strategy: ShardStrategy,
    saved: SavedAdapter | None = None,
) -> tuple[Trained, ...]:
    """Parameters that PEFT will make trainable in `model`, which is on meta, and stays as it is.

    quantized: its modules that will be packed, and the format of each. quant: the first, whose dtype adapters have.
    saved: what they will be read from.

    Raises `ConfigError` for what PEFT cannot build, a name that matches nothing, and what could not be trained as
    `strategy` shards it, or not saved; and `WeightsMismatchError` where `saved` has other tensors. Of decoder blocks
    that get the same adapters one stands for all.
    """
    check_modules(model, lora)
    unknown = unknown_targets(model, lora)
    blocks = decoder_blocks(model)
    alike = alike_blocks(blocks) if is_uniform(lora) else {}
    made = twin_of(model, _parameters_of(quantized, quant.storage), hollow=[block.module for block in alike])
    for module, kind in quantized.items():
        if module in made:
            kind.rehearse(made[module])
    base = {parameter: name for name, parameter in made[model].named_parameters()}
    adapted = _built(model, made[model], lora, quant.dtype, unknown)
    check_built(model, lora, adapted, unknown)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError("lora: these adapters have nothing to train; look at target_modules and inference_mode")
    packed = {made[module] for module in quantized if module in made}
    check_quantized(adapted, packed, dequantizes=type(quant).dequantize is not QuantFormat.dequantize)
    tried = [Site(fqn=PEFT_PREFIX + site.fqn, module=made[site.module]) for site in blocks if site not in alike]
    strategy.check_adapted(adapted, tried, _kept(adapted, packed, quant.dtype))
    shapes = _check_saving(adapted)
    if saved is not None:
        saved.check_tensors({**shapes, **dict(_repeated_keys(shapes, alike))})
    own = [
        Trained(
            fqn=base.get(parameter) or name.removeprefix(PEFT_PREFIX), shape=parameter.shape, is_base=parameter in base
        )
        for name, parameter in trained.items()
    ]
    return (*own, *_repeated(own, alike))


def _built(model: nn.Module, twin: nn.Module, lora: LoraConfig, dtype: torch.dtype, unknown: Sequence[str]) -> Any:
    """The twin, adapted; on meta, so that nothing is drawn."""
    try:
        with adapting(twin), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # PEFT says them again when it adapts the model itself
            return adapted_by_peft(twin, lora, dtype)
    except Exception as error:
        if lora.target_modules is None or type(error).__name__ == "NoMatchingPeftModuleError":
            check_targets(model, unknown)
        raise ConfigError(f"lora: PEFT cannot build these adapters: {type(error).__name__}: {error}") from error


def _check_saving(adapted: PeftModel) -> dict[str, torch.Size]:
    """The shapes of what `save_adapter` would save, by key. Refuses adapters that it could not."""
    every = adapted.named_parameters(remove_duplicate=False)
    try:
        found = by_peft_key(adapted, {name: parameter for name, parameter in every if parameter.requires_grad})
        return {key: tensor.shape for key, tensor in found.items()}
    except Exception as error:
        raise ConfigError(
            f"lora: these adapters could be trained, and not be saved: {type(error).__name__}: {error}"
        ) from error


def _parameters_of(quantized: Collection[nn.Module], storage: torch.dtype) -> Any:
    packed = set(quantized) if storage.is_floating_point else set()
    new: dict[nn.Parameter, nn.Parameter] = {}

    def parameters(_fqn: str, module: nn.Module) -> dict[str, Any]:
        return {
            name: None if p is None else new.setdefault(p, _like(p, storage if module in packed else p.dtype))
            for name, p in module._parameters.items()
        }

    return parameters


def _like(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    data = torch.empty(parameter.shape, dtype=dtype, device="meta")
    return nn.Parameter(data, requires_grad=dtype.is_floating_point and parameter.requires_grad)


def _repeated(own: Sequence[Trained], alike: dict[Site, Site]) -> Iterator[Trained]:
    for site, other in alike.items():
        start = f"{other.fqn}."
        for each in own:
            if each.fqn.startswith(start):
                yield Trained(fqn=join(site.fqn, each.fqn.removeprefix(start)), shape=each.shape, is_base=each.is_base)


def _repeated_keys(shapes: Mapping[str, torch.Size], alike: dict[Site, Site]) -> Iterator[tuple[str, torch.Size]]:
    for site, other in alike.items():
        start = f"{PEFT_PREFIX}{other.fqn}."
        for key, shape in shapes.items():
            if key.startswith(start):
                yield f"{PEFT_PREFIX}{site.fqn}.{key.removeprefix(start)}", shape


def check_quantized(adapted: PeftModel, packed: set[nn.Module], *, dequantizes: bool = True) -> None:
    """Refuse copies of packed weights and adapters of their packed form: bits would be trained as numbers.

    And magnitudes of weights in a format that cannot say what their values are. dequantizes: whether it can.
    """
    for name, module in adapted.named_modules():
        fqn = name.removeprefix(PEFT_PREFIX)
        if "modules_to_save" in module._modules and not packed.isdisjoint(module.original_module.modules()):
            raise ConfigError(
                f"lora.modules_to_save: {fqn} is, or has in it, a layer that goes to 4 bits, which can neither be "
                "trained nor saved: leave it out, or keep it in 16 bits with skip_modules"
            )
        if isinstance(getattr(module, "token_indices", None), dict) and module.get_base_layer() in packed:
            raise ConfigError(
                f"lora.trainable_token_indices: {fqn.removesuffix('.token_adapter')} goes to 4 bits, and rows of its "
                "packed form would be trained: leave it out, or keep it in 16 bits with skip_modules"
            )
        if getattr(module, "lora_magnitude_vector", None) and module.get_base_layer() in packed and not dequantizes:
            raise ConfigError(
                f"lora.use_dora: magnitudes of {fqn} are norms of its values, and its format does not define "
                "dequantize: use use_dora=False, or weights in 4 or 16 bits"
            )
        if "parameter_name" in vars(module) and _is_storage(module, packed):
            raise ConfigError(
                f"lora.target_parameters: {fqn}.{module.parameter_name} goes to 4 bits, and adapters of parameters "
                "would be added to its packed form: use target_modules, or keep it in 16 bits with skip_modules"
            )


def _is_storage(wrapper: Any, packed: set[nn.Module]) -> bool:
    """Whether a parameter that PEFT has wrapped is stored packed, and is none that it can adapt so."""
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    stacks = stacks_of(base)
    return base in packed and name not in stacks and (not stacks or name.removesuffix(STATISTICS) in stacks)


def _kept(adapted: PeftModel, packed: set[nn.Module], dtype: torch.dtype) -> set[nn.Parameter]:
    """The frozen parameters that FSDP1 will leave whole on every rank, since upstream keeps them in another dtype."""
    stored = {parameter for module in packed for parameter in module.parameters(recurse=False)}
    found = kept_parameters(adapted, dtype, ends=False).values()
    return {parameter for parameter in found if not parameter.requires_grad and parameter not in stored}
