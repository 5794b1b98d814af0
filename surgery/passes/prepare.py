"""A model on meta with its weights matched and its modules replaced: all checks that need no weight are made here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.adapters.metadata import Base
from surgery.adapters.rehearsal import Trained, rehearse
from surgery.checkpoint import Checkpoint
from surgery.comm.ranks import Ranks
from surgery.errors import ConfigError, WeightsMismatchError
from surgery.model.consistency import same_adapter, same_model
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.tree import Site, sites, tied_parameters
from surgery.model.weights import plan_weights
from surgery.passes.base import Naming
from surgery.passes.replace import Replace, held_packed, precisions, quantizable, weights_of
from surgery.passes.setting import Setting
from surgery.passes.tensors import Target, find_targets
from surgery.quantizers.base import QuantFormat

__all__ = ["Prepared", "check_magnitudes", "match", "prepare"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A model before a weight is read, and all that is known of it.

    model: on meta, its modules replaced, not adapted yet. targets: what the checkpoint fills, in the model's order.
    trained: parameters that adapters will make trainable. unsharded: FQNs of parameters that stay whole on every rank.
    ignored: names of the checkpoint that nothing is made of. initialized: FQNs of buffers that it lacks. left_out: FQNs
    of weights that stay in 16 bits though their kind is quantized.
    """

    model: nn.Module = field(repr=False)
    setting: Setting
    targets: tuple[Target, ...] = field(repr=False)
    trained: tuple[Trained, ...] = field(repr=False)
    unsharded: frozenset[str]
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def prepare(
    checkpoint: Checkpoint,
    setting: Setting,
    *,
    build: Callable[[], nn.Module] | None = None,
    attention: str | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  # frozen
    device: torch.device = torch.device("cpu"),  # noqa: B008  # a constant
) -> Prepared:
    """Build a model on meta, and `match` it with `checkpoint`; no weight is read.

    build: makes the module; None builds what the checkpoint's config.json describes, with that `attention`. ranks,
    device: as for `match`.
    """
    build = build or causal_lm(checkpoint, setting.dtype, attention)
    model = build_on_meta(build, dtype=setting.dtype, device=device)
    return match(model, checkpoint, setting, ranks=ranks, device=device)


def match(
    model: nn.Module,
    checkpoint: Checkpoint,
    setting: Setting,
    *,
    ranks: Ranks,
    device: torch.device,
    conversions: Sequence[Any] | None = None,
    is_chosen: bool = False,
) -> Prepared:
    """Match `model`, which is on meta, with `checkpoint`, and replace its modules; no weight is read.

    To be called on all ranks alike, inside of `everyone`. device: of buffers that no checkpoint holds. conversions: as
    in `plan_weights`. is_chosen: whether upstream has made the modules that are to be quantized, and no others are.
    Raises what would end the loading, adapting, sharding or saving of this model, as far as it is known; `model` is as
    it was then.
    """
    setting = setting.reading(checkpoint)
    formats, strategy = setting.formats, setting.strategy
    same_model(ranks, model, checkpoint)
    if setting.adapter is not None:
        same_adapter(ranks, setting.adapter.index)
    weights = plan_weights(model, checkpoint, device=device, conversions=conversions)
    tied = tied_parameters(model)
    if is_chosen:
        chosen = {setting.format: _made_by_upstream(model, setting.format)}
        chosen |= quantizable(model, formats[1:]) if formats[1:] else {}  # for which upstream has no word
    elif weights.packed:
        chosen = held_packed(model, formats, weights.packed)
    else:
        chosen = quantizable(model, formats)
    every = [site for found in chosen.values() for site in found]
    _require_alike(chosen[setting.format], weights.packed, checkpoint)
    strategy.check_ties(tied)
    trained: tuple[Trained, ...] = ()
    if setting.lora is not None:
        quantized = {site.module: quant for quant, found in chosen.items() for site in found}
        if setting.adapter is not None:
            setting.adapter.check_base(Base.of(checkpoint))
        trained = rehearse(
            model, setting.lora, quantized=quantized, quant=setting.format, strategy=strategy, saved=setting.adapter
        )
    # A packed weight is stored as the module has it that was quantized, so that it is turned if it is not to be packed.
    to_pack = {site.module for site in every}
    transposed = frozenset(
        f"{site.fqn}.weight"
        for site in sites(model)
        if setting.format.is_transposed(site.module)
        and (site.module in to_pack) != (f"{site.fqn}.weight" in weights.packed)
    )
    for quant, found in chosen.items():
        with Naming(Replace.name, "the model"):
            model = Replace(quant=quant, chosen=found, marks=not is_chosen).run(model)
    if not strategy.holds_whole and setting.adapter is None:  # else PEFT makes them, of what it reads, or they are read
        check_magnitudes(model, setting, [each.fqn for each in trained])
    targets = find_targets(
        model,
        weights.assignments,
        checkpoint.index,
        formats,
        tied=tied,
        packed=checkpoint.packed,
        transposed=transposed,
        precisions=precisions(model, weights_of(chosen), setting.dtype),
    )
    return Prepared(
        model=model,
        setting=setting,
        targets=targets,
        trained=trained,
        unsharded=strategy.check_model(model, setting.format),
        ignored=weights.ignored,
        initialized=weights.initialized,
        left_out=tuple(name for quant in formats for name in quant.left_out(model)),
    )


def check_magnitudes(model: nn.Module, setting: Setting, trained: Iterable[str]) -> None:
    """Refuse magnitudes of DoRA, among the FQNs `trained`, that are not those of the weights that forward will read.

    model: its modules are replaced.
    """
    adapted = [name.partition(".lora_magnitude_vector.")[0] for name in trained if ".lora_magnitude_vector." in name]
    if not adapted or not setting.on_cpu:
        return
    misread = {name.replace(".base_layer.", ".") for name in setting.format.misread(model)}
    lost = [f"{name}.weight" for name in adapted if f"{name}.weight" in misread]
    if lost:
        raise ConfigError(
            f"lora.use_dora: bitsandbytes takes {lost[0]} ({len(lost)} in all) for another weight on this CPU, whose "
            "magnitudes would be others: apply the patch bitsandbytes.cpu-dequantize-flat for the whole process, leave "
            "it out of target_modules, or use placement='replicated', where they are as wrong as the weight"
        )


def _require_alike(chosen: Sequence[Site], packed: frozenset[str], checkpoint: Checkpoint) -> None:
    """Refuse a packed checkpoint that has the weight of a quantized module in 16 bits, which forward would misread."""
    plain = [f"{site.fqn}.weight" for site in chosen if packed and f"{site.fqn}.weight" not in packed]
    if plain:
        raise WeightsMismatchError(
            f"{plain[0]} is quantized by config.json, and {checkpoint.path} holds it unpacked, beside packed weights: "
            "name the module in llm_int8_skip_modules of quantization_config",
            path=checkpoint.path,
            tensor=plain[0],
        )


def _made_by_upstream(model: nn.Module, quant: QuantFormat) -> tuple[Site, ...]:
    """The quantized modules of `model`. Raises `ConfigError` for one whose weight cannot be packed, before any is."""
    chosen = tuple(site for site in sites(model) if quant.is_quantized(site.module))
    for site in chosen:
        quant.layout(site.module, "weight").packed_shape(quant.logical(site.module, "weight"), quant.storage)
    return chosen
