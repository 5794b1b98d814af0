"""Loading a saved adapter into a model, sharded or not: each rank reads what it keeps of it, and writes it in place."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.adapters.attach import PLAIN, adapting, needs_weights
from surgery.adapters.metadata import base_of
from surgery.adapters.rehearsal import check_quantized
from surgery.adapters.save import adapter_parts, belongs_to, find_peft_model, search_peft_model
from surgery.adapters.saved import SavedAdapter
from surgery.comm.comparison import facts_of, same_on_every_rank
from surgery.comm.failures import everyone, together
from surgery.comm.ranks import Ranks, current_ranks
from surgery.errors import ConfigError
from surgery.model.consistency import same_adapter, source_facts
from surgery.model.fqn import clean
from surgery.model.tree import convert
from surgery.model.twin import twin_of
from surgery.quantizers.base import quantized_modules
from surgery.quantizers.stack import stacks_of
from surgery.sharding.base import Part, ShardStrategy, device_of, strategy_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

__all__ = ["fill_adapter", "fill_waiting", "load_adapter", "open_adapter"]

#: Options of `PLAIN` that change what an adapter computes, and not only which modules have one.
_SHAPING = frozenset({"alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "lora_bias", "rank_pattern", "r",
                      "use_rslora"})  # fmt: skip


def open_adapter(
    source: str | os.PathLike[str], ranks: Ranks, *, device: torch.device, lora: LoraConfig | None
) -> SavedAdapter:
    """Open a saved adapter on all ranks alike; collective. Raises `ConfigError` where there is `lora` too."""
    same_on_every_rank(ranks, "adapter's place", {"adapter": source_facts(source)}, device=device)
    with everyone(ranks, device=device):
        if lora is not None:
            raise ConfigError("expected lora= or adapter=, found both: the configuration of the adapter decides")
        # Collective for a hub id, but then it fails on all ranks or on none, so that they meet all the same.
        return SavedAdapter.open(source)


@together()
def load_adapter(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Load a saved LoRA adapter into `model`, and make it the active one; to be called on all ranks alike.

    If `model` has an adapter `name`, its values are replaced, in place, where they are: each rank reads its part. If it
    has none, one is added, which every rank has whole, and which FSDP2 trains by the mean of all gradients; FSDP1
    cannot add one, DDP not train it. Values are cast to the dtype that adapters of the model have, or else its
    unquantized weights. `set_adapter` and `disable_adapter` of PEFT switch among several.

    Args:
        model: what `surgery.qlora`, `surgery.fill` or a trainer has made, or a bound model that waits to be filled.
        source: a folder in PEFT's format, or a hub id.
        name: of the adapter in `model`.
        trainable: whether it is trained on; if not, it is frozen, and `model` in evaluation mode, as by PEFT.
        revision: branch, tag or commit of a hub id.

    Returns `model`; where it had no adapter yet, the `PeftModel` around it.

    Raises:
        ConfigError: no adapter that could be loaded here, or one of another revision of the base model.
        CheckpointError: its file is broken, has other tensors, or a value that is not finite. In either case nothing
            has changed.
        PeerError: another rank has failed.
    """
    ranks, device = current_ranks(), device_of(model)
    asked = {"name": name, "trainable": trainable, "revision": revision}
    topics = {"adapter": {**facts_of(asked), **source_facts(source)}}
    same_on_every_rank(ranks, "load_adapter", topics, device=device)
    with everyone(ranks, device=device):
        strategy_of(model).settle(model)
        saved = SavedAdapter.open(source, revision=revision)
        base = base_of(model)
        saved.check_base(base)
        same_adapter(ranks, saved.index)
        config = saved.fresh_config(trainable=trainable)
        _, adapted = search_peft_model(model)
        is_new = adapted is None or name not in adapted.peft_config
        if adapted is None or is_new:
            _check_new(model, adapted, config, name, saved)
            values = _read(saved, {key: range(entry.numel) for key, entry in saved.index.items()})
        else:
            _check_same(adapted.peft_config[name], config, name)
    if not is_new:
        fill_adapter(model, saved, ranks, name)
        return _activated(model, name, trainable=trainable)
    model = _added(model, adapted, config, name)
    with everyone(ranks, device=device):
        _write(adapter_parts(model, name), values)
    if needs_weights(config) and _is_on_meta(model):
        _later.setdefault(model, []).append((saved, name))
    if base is not None:
        config.base_model_name_or_path, config.revision = base.name, base.revision or saved.base.revision
    return _activated(model, name, trainable=trainable)


#: By the model that waits for its weights: adapters with parameters that are made of weights when it is filled.
_later: weakref.WeakKeyDictionary[nn.Module, list[tuple[SavedAdapter, str]]] = weakref.WeakKeyDictionary()


def fill_waiting(model: nn.Module, ranks: Ranks) -> None:
    """Fill what `load_adapter` could not when `model`, or one in it, had no weights; collective."""
    for module in list(model.modules()):
        for saved, name in _later.pop(module, []):
            fill_adapter(model, saved, ranks, name)


def fill_adapter(model: nn.Module, saved: SavedAdapter, ranks: Ranks, name: str = "default") -> None:
    """Read this rank's part of every tensor of the adapter `name`, and write it in place; collective.

    Where one rank fails, all do, and nothing is changed.
    """
    with everyone(ranks, device=device_of(model)):
        strategy_of(model).settle(model)
        parts = adapter_parts(model, name)
        saved.check_tensors({key: part.shape for key, part in parts.items()})
        ranges = {key: range(part.start, part.start + part.data.numel()) for key, part in parts.items()}
        values = _read(saved, ranges)
    _write(parts, values)


def _read(saved: SavedAdapter, ranges: Mapping[str, range]) -> dict[str, torch.Tensor]:
    with saved.reading() as file:
        return {key: file.read(key, elements.start, elements.stop) for key, elements in ranges.items()}


def _write(parts: Mapping[str, Part], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for key, part in parts.items():
            part.data.copy_(values[key].view(part.data.shape))


def _check_new(model: nn.Module, adapted: PeftModel | None, config: LoraConfig, name: str, saved: SavedAdapter) -> None:
    """Refuse what cannot be added to `model`, which stays as it is: PEFT adds it to a copy on meta."""
    if not name or "." in name or name in "lora_":
        raise ConfigError(f"expected a name for the adapter that PEFT can tell from its own, found {name!r:.80}")
    strategy_of(model).check_added(config)
    target = model if adapted is None else adapted
    made = twin_of(target, _on_meta)
    twin = next(iter(made.values()))
    packed = {made[layer] for layer in quantized_modules(target) if layer in made}
    for layer in packed:
        if not stacks_of(layer):  # of experts PEFT asks what their stacks tell
            _unpack(layer)
    try:
        with adapting(twin), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # PEFT says them again when it adapts the model itself
            tried = _with_adapter(twin, copy.deepcopy(config), name, is_adapted=adapted is not None)
    except Exception as error:
        raise ConfigError(
            f"{saved.path}: PEFT cannot add this adapter to a {type(target).__name__}: {type(error).__name__}: {error}"
        ) from error
    check_quantized(tried, packed)
    expected = adapter_parts(tried, name, ShardStrategy(None))
    saved.check_tensors({key: part.shape for key, part in expected.items()})


def _on_meta(_fqn: str, module: nn.Module) -> dict[str, Any]:
    """Whole parameters on meta like those of `module`, of which this rank may have a part."""
    held = module._parameters.items()
    return {name: None if p is None else nn.Parameter(_empty(p), requires_grad=False) for name, p in held}


def _empty(parameter: nn.Parameter) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


def _unpack(layer: Any) -> None:
    """Make a linear layer of a packed one, of which PEFT would ask what only its own parameter can tell."""
    layer.__class__ = nn.Linear
    shape = (layer.out_features, layer.in_features)
    layer._parameters["weight"] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _check_same(existing: PeftConfig, config: LoraConfig, name: str) -> None:
    """Refuse values that mean something else in the adapter that is there."""
    mine, its = vars(existing), vars(config)
    free = (PLAIN - _SHAPING) | ({"lora_dropout"} if config.inference_mode else set())
    other = [each for each in its if each not in free and _plain(mine.get(each)) != _plain(its[each])]
    if other:
        found = ", ".join(f"{each} {mine.get(each)!r:.80}, found {its[each]!r:.80}" for each in other[:3])
        raise ConfigError(
            f"expected an adapter with the options of {name!r}, which the model has and whose values it is to replace: "
            f"{found}; load it under another name, or begin from it (surgery.qlora(adapter=...))"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, (list, set, tuple)):
        return sorted(map(str, value)) or None
    return value or None  # options that are empty, and that are not set


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _added(model: nn.Module, adapted: PeftModel | None, config: LoraConfig, name: str) -> nn.Module:
    """`model`, or the `PeftModel` around it, with an adapter `name` that has no values yet."""
    dtype, before = _dtype(model), set(model.parameters())
    with torch.random.fork_rng(devices=()):  # what is drawn is replaced
        found = _with_adapter(adapted or model, config, name, is_adapted=adapted is not None)
    model = found if adapted is None else model
    # Copies of whole modules keep the dtypes of those.
    added = [p for fqn, p in model.named_parameters() if p not in before and ".modules_to_save." not in fqn]
    convert(added, dtype=dtype)
    return model


def _with_adapter(model: Any, config: LoraConfig, name: str, *, is_adapted: bool) -> PeftModel:
    from peft import get_peft_model

    if not is_adapted:
        return get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    model.add_adapter(name, config)
    return model  # type: ignore[no-any-return]


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of adapters that `model` has, or else of its first unquantized parameter."""
    packed = {parameter for layer in quantized_modules(model) for parameter in layer.parameters(recurse=False)}
    named = [(n, p.dtype) for n, p in model.named_parameters() if p.is_floating_point() and p not in packed]
    return next((dtype for fqn, dtype in named if ".lora_" in fqn), named[0][1])


def _activated(model: nn.Module, name: str, *, trainable: bool) -> nn.Module:
    """`model`, with this one adapter in use."""
    prefix, adapted = find_peft_model(model)
    config = adapted.peft_config[name]
    config.inference_mode = not trainable
    if list(adapted.active_adapters) != [name]:
        adapted.set_adapter(name, inference_mode=not trainable)
    is_its_own = belongs_to(config, name, prefix)
    for fqn, parameter in model.named_parameters():
        if is_its_own(clean(fqn)):
            parameter.requires_grad_(trainable)
    return model if trainable else model.eval()
