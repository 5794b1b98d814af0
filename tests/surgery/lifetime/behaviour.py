"""Models of the recipe, stock layers, and what a user can see of the patches on either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig
from torch import nn

import patches
import surgery
from tests.helpers.snapshot import Snapshot

__all__ = [
    "OBSERVED",
    "PATCHED",
    "InjectedError",
    "assert_stock",
    "behaviour",
    "build",
    "layers_of",
    "run",
    "square",
    "stock_layers",
]


class InjectedError(Exception):
    """Raised by the tests."""


def assert_stock(before: Snapshot) -> None:
    """Nothing is patched, and no owner has an attribute that it had not, or another one."""
    assert patches.active() == []
    assert before.differences() == []


def build(checkpoint: Path, **options: Any) -> nn.Module:
    lora = LoraConfig(r=2, target_modules="all-linear")
    return surgery.qlora(checkpoint, report=surgery.Report(), **{"lora": lora, **options})


def run(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(8).view(1, 8)).logits
    return logits


def layers_of(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def square(model: nn.Module) -> list[Linear4bit]:
    """Layers of the one shape that `stock_layers` has: what bitsandbytes does on a CPU depends on it."""
    return [layer for layer in layers_of(model) if (layer.in_features, layer.out_features) == (64, 64)]


def stock_layers(count: int) -> list[Linear4bit]:
    """Quantized by bitsandbytes alone."""
    make: Any = Linear4bit
    kind = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    return [make(64, 64, **kind).to("cpu") for _ in range(count)]


OBSERVED = 2


def behaviour(layers: list[Linear4bit]) -> dict[str, Any]:
    """What a user can see of the patches, each on a layer of its own, which is spoiled by it."""
    emptied, evaluated = layers[:OBSERVED]
    emptied.weight = Params4bit(emptied.weight.data.to("meta"), requires_grad=False, **vars(emptied.weight))
    emptied.to_empty(device="cpu")
    with torch.no_grad():
        evaluated.eval()(_input_of(evaluated))
    return {
        "weight after to_empty": type(emptied.weight).__name__,
        "evaluation repacks": bool(getattr(evaluated.quant_state, "packing_format_for_cpu", False)),
    }


def _input_of(layer: Linear4bit) -> torch.Tensor:
    return torch.ones(1, layer.in_features, dtype=torch.bfloat16)


PATCHED = {
    "weight after to_empty": "Params4bit",
    "evaluation repacks": False,
}
