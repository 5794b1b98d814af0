"""The tensors that PEFT will add to a model, from the shapes of its modules: nothing is built."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["AdapterTensor", "adapter_tensors"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterTensor:
    """One trainable parameter. module: the one that is adapted. shape: sharded along dimension 0."""

    module: nn.Module
    shape: torch.Size


def adapter_tensors(model: nn.Module, lora: LoraConfig) -> tuple[AdapterTensor, ...]:
    """What `peft.get_peft_model(model, lora)` makes trainable, in the order of the modules.

    LoRA (https://arxiv.org/abs/2106.09685): `(r, in)` and `(out, r)` for each target, `rank_pattern` heeded; with DoRA
    `(out,)` more; and a copy of each of `modules_to_save`. Adapters of `target_parameters` are not counted.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    config: Any = copy.deepcopy(lora)
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        config.target_modules = set(DEFAULTS.get(getattr(getattr(model, "config", None), "model_type", ""), ()))
    config = _maybe_include_all_linear_layers(config, model)
    saved = tuple(config.modules_to_save or ())
    found: list[AdapterTensor] = []
    for name, module in model.named_modules():
        if name and name.rpartition(".")[2] in saved:
            found.extend(AdapterTensor(module=module, shape=p.shape) for p in module.parameters())
        elif name and config.target_modules and check_target_module_exists(config, name):
            found.extend(AdapterTensor(module=module, shape=shape) for shape in _shapes(name, module, config))
    return tuple(found)


def _shapes(name: str, module: nn.Module, config: Any) -> Iterator[torch.Size]:
    from peft.utils.other import get_pattern_key

    ends = _features(module)
    if ends is None:
        return
    inputs, outputs = ends
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    yield torch.Size((r, inputs))
    yield torch.Size((outputs, r))
    if config.use_dora:
        yield torch.Size((outputs,))


def _features(module: nn.Module) -> tuple[int, int] | None:
    """What goes in and what comes out; None for what PEFT has no adapter for."""
    if isinstance(module, nn.Linear):  # a Linear4bit too, whose weight has another shape
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight = getattr(module, "weight", None)
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None
