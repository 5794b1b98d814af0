"""Pass `replace`: quantized modules in the place of linear ones, on meta."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery.errors import ConfigError, QuantizerError, SelectorError
from surgery.model.fqn import join, match_any, require_matches
from surgery.model.pretrained import is_pretrained, not_converted, planned_dtypes
from surgery.model.tree import Site, replace_module, sites
from surgery.passes.base import Pass
from surgery.quantizers.base import QuantFormat

__all__ = ["Replace", "held_packed", "precisions", "quantizable", "weights_of"]


@dataclass(frozen=True, kw_only=True)
class Replace(Pass):
    """Put quantized modules in the place of the `chosen` ones; aliases of a shared module stay shared.

    marks: whether to set what upstream sets on a model that it quantizes.
    """

    name = "replace"

    quant: QuantFormat
    chosen: tuple[Site, ...]
    marks: bool = True

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, changed in place."""
        for site in self.chosen:
            held = [name for name, parameter in site.module.named_parameters() if not parameter.is_meta]
            if held:
                raise ConfigError(
                    f"{site.fqn}.{held[0]} is not on meta: build the model on meta, and bind it before fill()"
                )
            new = self.quant.replacement(site.module)
            _check_replacement(self.quant, site.fqn, new)
            if new is not site.module:
                replace_module(model, site, new)
        if self.marks:
            self.quant.mark(model)
        return model


def _check_replacement(quant: QuantFormat, fqn: str, new: nn.Module) -> None:
    name = type(quant).__name__
    if not quant.is_quantized(new):
        raise QuantizerError(
            f"{name}.replacement made a {type(new).__name__} of {fqn}, which is_quantized denies: make them agree"
        )
    real = [each for each, parameter in new.named_parameters() if not parameter.is_meta]
    if real:
        raise QuantizerError(f"{name}.replacement made {fqn}.{real[0]} in memory: make it on meta, to be filled later")


def quantizable(model: nn.Module, formats: Sequence[QuantFormat]) -> dict[QuantFormat, tuple[Site, ...]]:
    """The sites of `model` that each of `formats` replaces.

    All that it takes but: the output head, modules with a tied weight, and what its `skip_modules` matches (a pattern
    that matches nothing raises `SelectorError`, as does a model with nothing left to quantize).
    """
    first = formats[0]
    candidates = {quant: [s for s in sites(model) if s.fqn and quant.takes(s.module)] for quant in formats}
    every = [site for found in candidates.values() for site in found]
    if not first.needs_modules and not every:
        return dict.fromkeys(formats, ())
    require_matches("skip_modules", first.skip_modules, [site.fqn for site in every])
    keep = _kept_whole(model, every)
    chosen = {
        quant: tuple(s for s in found if s.fqn not in keep and not match_any(s.fqn, quant.skip_modules))
        for quant, found in candidates.items()
    }
    if first.needs_modules and not any(chosen.values()):
        raise SelectorError(
            f"{type(model).__name__} has no linear module to quantize: of {len(candidates[first])} torch.nn.Linear "
            "all are the output head, tied, or in skip_modules (subclasses of Linear have a forward of their own, and "
            "stay)",
            patterns=first.skip_modules,
        )
    return chosen


def held_packed(
    model: nn.Module, formats: Sequence[QuantFormat], packed: frozenset[str]
) -> dict[QuantFormat, tuple[Site, ...]]:
    """The sites of `model` that each of `formats` replaces where the parameters `packed` are packed in the checkpoint.

    What the format cannot take, and tied modules, are left; their weights are dequantized. What upstream has no format
    for is quantized, unless the checkpoint has some of that packed.
    """
    tied, keep = _tied(model), _kept_whole(model, [site for site in sites(model) if site.fqn])
    holders = {name.rpartition(".")[0] for name in packed}
    candidates = [site for site in sites(model) if site.module not in tied]
    chosen: dict[QuantFormat, tuple[Site, ...]] = {}
    for quant in formats:
        taken = [site for site in candidates if quant.takes(site.module)]
        held = [site for site in taken if site.fqn in holders]
        is_all = quant is formats[0] or bool(held)
        chosen[quant] = tuple(held if is_all else [site for site in taken if site.fqn not in keep])
    return chosen


def _kept_whole(model: nn.Module, candidates: list[Site]) -> set[str]:
    """FQNs of modules that transformers too leaves unquantized: the output head, modules with tied weights, and what
    the class of the model names (`_keep_in_fp32_modules`).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = _tied(model)
    found = {site.fqn for site in candidates if site.module in tied or site.module is head}
    if not is_pretrained(model):
        return found
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = not_converted(model)
    return found | {site.fqn for site in candidates if not should_convert_module(site.fqn, patterns)}


def _tied(model: nn.Module) -> set[nn.Module]:
    """Modules that share a parameter with another one."""
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for site in sites(model):
        for parameter in site.module.parameters(recurse=False):
            owners[parameter].add(site.module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def precisions(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """FQN -> dtype of those weights of `names` that upstream quantizes from another dtype than `dtype`, the model's.

    So it does where the class wants one in float32; what a constructor has made in float32 by itself is cast first.
    """
    if not is_pretrained(model):
        return {}
    planned = planned_dtypes(model, dtype)
    found = {name: planned(name) for name in names}
    return {name: wanted for name, wanted in found.items() if wanted is not None and wanted != dtype}


def weights_of(chosen: Mapping[QuantFormat, Sequence[Site]]) -> list[str]:
    """FQNs of the packed weights of the `chosen` modules, which are replaced."""
    return [
        join(site.fqn, name)
        for quant, found in chosen.items()
        for site in found
        for name in quant.weight_names(site.module)
    ]
