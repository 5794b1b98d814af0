"""Experts modules of transformers, tiny, and the same in 4 bits: packed an expert at a time, by bitsandbytes itself."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from surgery.quantizers.base import STATISTICS
from surgery.quantizers.experts import IMPLEMENTATION
from surgery.quantizers.stack import PackedStack

__all__ = ["CLASSES", "EXPERTS", "HIDDEN", "experts_module", "packed_experts", "packed_stack"]

HIDDEN, INTERMEDIATE, EXPERTS = 64, 32, 6

#: Experts by the type of the model that has them, those of installed models.
CLASSES = {
    family: name
    for family, name in {
        "olmoe": "OlmoeExperts",
        "qwen3_moe": "Qwen3MoeExperts",
        "qwen3_next": "Qwen3NextExperts",
        "mixtral": "MixtralExperts",
        "gpt_oss": "GptOssExperts",
        "deepseek_v3": "DeepseekV3Experts",
        "glm4_moe": "Glm4MoeExperts",
        "nemotron_h": "NemotronHExperts",
        "muse_spark_text": "MuseSparkExperts",
    }.items()
    if family in CONFIG_MAPPING
}


def experts_module(family: str, dtype: torch.dtype) -> Any:
    """The experts of a model of type `family`, with random weights and biases, dispatched to `grouped_mm`."""
    config = AutoConfig.for_model(family)
    sizes = {"expert": EXPERTS, "intermediate": INTERMEDIATE, "hidden": HIDDEN}
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    for name in ("hidden_size", "moe_hidden_size", "intermediate_size", "moe_intermediate_size", *counts):
        if hasattr(config, name):
            setattr(config, name, next(size for word, size in sizes.items() if word in name))
    config._experts_implementation = "grouped_mm"
    modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    module = getattr(modeling, CLASSES[family])(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def packed_stack(weights: torch.Tensor, **options: Any) -> tuple[PackedStack, torch.Tensor, torch.Tensor]:
    """A stack of `weights`, `(experts, d1, d2)`, its packed bytes and its statistics: as `quantize_4bit` gives each.

    options: those of `PackedStack` that are not of the weights.
    """
    stack = PackedStack(experts=len(weights), shape=tuple(weights.shape[1:]), dtype=weights.dtype, **options)
    found = [
        quantize_4bit(
            each.detach().contiguous(),
            blocksize=stack.blocksize,
            compress_statistics=stack.double_quant,
            quant_type=stack.quant_type,
        )
        for each in weights
    ]
    states: list[QuantState] = [state for _packed, state in found]
    statistics = {"absmax": torch.cat([state.absmax for state in states])}
    if stack.double_quant:
        statistics["nested_absmax"] = torch.cat([state.state2.absmax for state in states])
        statistics["offset"] = torch.stack([state.offset for state in states])
    return stack, torch.cat([packed.view(-1) for packed, _state in found]), stack.assemble(statistics)


def packed_experts(module: Any, *, storage: torch.dtype = torch.uint8, **options: Any) -> tuple[Any, Any]:
    """`(packed, dequantized)`: copies of an experts module, one in 4 bits, one with the values that those stand for."""
    options = {"quant_type": "nf4", "blocksize": 64, "double_quant": False, **options}
    packed, dequantized = copy.deepcopy(module), copy.deepcopy(module)
    packed.packed_stacks, packed.quant_storage = {}, storage
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        stack, *both = packed_stack(getattr(module, name), **options)
        packed.packed_stacks[name] = stack
        for each, data in zip((name, name + STATISTICS), both, strict=True):
            packed.register_parameter(each, nn.Parameter(data.view(storage).unsqueeze(1), requires_grad=False))
        setattr(dequantized, name, nn.Parameter(stack.dequantize(*both, range(stack.experts))))
    packed.config = copy.copy(module.config)
    packed.config._experts_implementation_internal = IMPLEMENTATION
    return packed.requires_grad_(requires_grad=False), dequantized.requires_grad_(requires_grad=False)
