"""Put quantized modules in the place of linear ones, on meta."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from surgery.errors import SelectorError
from surgery.model.pretrained import is_pretrained, not_converted, planned_dtypes
from surgery.model.selectors import match_any, require_matches
from surgery.model.tree import Site, replace_module, sites
from surgery.passes.base import Pass
from surgery.quantizers.base import Quantizer
from surgery.quantizers.bnb import is_conv1d, is_linear_like

__all__ = ["Replace", "precisions", "quantizable", "transposed"]


def quantizable(model: nn.Module, skip_modules: tuple[str, ...]) -> list[Site]:
    """The linear sites of `model` that go to 4 bits.

    All but: the output head, modules with a tied weight, and what `skip_modules` matches (a pattern that matches
    nothing raises `SelectorError`, as does a model with nothing left to quantize).
    """
    candidates = [site for site in sites(model) if site.fqn and is_linear_like(site.module)]
    require_matches("skip_modules", skip_modules, [site.fqn for site in candidates])
    keep = _kept_whole(model, candidates)
    chosen = [s for s in candidates if s.fqn not in keep and not match_any(s.fqn, skip_modules)]
    if not chosen:
        raise SelectorError(
            f"{type(model).__name__} has no linear module to quantize: of {len(candidates)} torch.nn.Linear all are "
            "the output head, tied, or in skip_modules (subclasses of Linear have a forward of their own, and stay)",
            patterns=skip_modules,
        )
    return chosen


def _kept_whole(model: nn.Module, candidates: list[Site]) -> set[str]:
    """FQNs of modules that transformers too leaves unquantized: the output head, modules with tied weights, and what
    the class of the model names (`_keep_in_fp32_modules`).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for site in sites(model):
        for parameter in site.module.parameters(recurse=False):
            owners[parameter].add(site.module)
    tied = {module for modules in owners.values() if len(modules) > 1 for module in modules}
    found = {site.fqn for site in candidates if site.module in tied or site.module is head}
    if not is_pretrained(model):
        return found
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = not_converted(model)
    return found | {site.fqn for site in candidates if not should_convert_module(site.fqn, patterns)}


def transposed(chosen: list[Site]) -> frozenset[str]:
    """FQNs of the weights that the checkpoint holds as `(in, out)`."""
    return frozenset(f"{site.fqn}.weight" for site in chosen if is_conv1d(site.module))


def precisions(model: nn.Module, chosen: list[Site], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """FQN -> dtype of the weights that upstream quantizes from another dtype than `dtype`, the model's.

    So it does where the class wants one in float32; what a constructor has made in float32 by itself is cast first.
    """
    if not is_pretrained(model):
        return {}
    planned = planned_dtypes(model, dtype)
    found = {name: planned(name) for name in (f"{site.fqn}.weight" for site in chosen)}
    return {name: wanted for name, wanted in found.items() if wanted is not None and wanted != dtype}


@dataclass(frozen=True, kw_only=True)
class Replace(Pass):
    """Replaces every module that `quantizable` chooses; aliases of a shared module get the same new one."""

    name: ClassVar[str] = "replace"
    requires: ClassVar[frozenset[str]] = frozenset({"on-meta"})
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized-modules"})

    quantizer: Quantizer
    skip_modules: tuple[str, ...] = ()

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, changed in place."""
        for site in quantizable(model, self.skip_modules):
            replace_module(model, site, self.quantizer.replacement(site.module))
        return model
