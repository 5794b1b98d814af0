"""Decoder blocks that get the same adapters: PEFT is asked about one, and the others follow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from surgery.model.tree import Site

__all__ = ["alike_blocks", "is_uniform"]

#: Attributes in which blocks that are alike differ: their place, which no adapter depends on.
PLACES = frozenset({"layer_idx"})

#: Types of attributes that are compared. Others are containers of modules, hooks, or a whole configuration.
PLAIN_TYPES = frozenset({bool, int, float, str, torch.dtype, torch.device, type(None)})


def is_uniform(lora: Any) -> bool:
    """Whether the options treat all decoder blocks alike: they are plain names, none with a number."""
    numbers = (lora.layers_to_transform is not None, lora.layers_pattern)
    indices = getattr(lora, "trainable_token_indices", None)
    parameters = getattr(lora, "target_parameters", None)
    named = (lora.target_modules, lora.exclude_modules, lora.modules_to_save, parameters)
    patterns = (*named, lora.rank_pattern, lora.alpha_pattern, indices if isinstance(indices, dict) else None)
    names = [name for each in patterns for name in ([each] if isinstance(each, str) else each or ())]
    plain = all(name.lower() == "all-linear" or all(map(str.isidentifier, name.split("."))) for name in names)
    return plain and not any(numbers)


def alike_blocks(blocks: Sequence[Site]) -> dict[Site, Site]:
    """Map `blocks` to the first one with the same modules, parameters, names and settings; that one is left out."""
    first: dict[object, Site] = {}
    found = {site: first.setdefault(tuple(_kinds(site.module)), site) for site in blocks}
    holders = Counter(parameter for site in blocks for parameter in site.module.parameters())
    shared = {site for site in blocks if site.aliases or any(holders[p] > 1 for p in site.module.parameters())}
    return {site: other for site, other in found.items() if site is not other and not {site, other} & shared}


def _kinds(block: nn.Module) -> Iterator[object]:
    """All of the modules of `block` that their adapters may depend on."""
    for name, module in block.named_modules():
        yield name, type(module), _settings(module), *map(_shape, module._parameters.items())


def _settings(held: object) -> tuple[tuple[str, object], ...]:
    return tuple(
        (name, value) for name, value in vars(held).items() if type(value) in PLAIN_TYPES and name not in PLACES
    )


def _shape(held: tuple[str, nn.Parameter | None]) -> object:
    name, parameter = held
    if parameter is None:
        return None
    return name, type(parameter), parameter.shape, parameter.dtype, parameter.device, _settings(parameter)
