"""`peft.dora-of-blank-weights`, with PEFT's own layers: linear, embedding and convolution."""

from __future__ import annotations

from typing import Any

import peft.tuners.lora.dora as upstream
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import patches

from .four_bit import unchanged

ID = "peft.dora-of-blank-weights"

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (3,)),
    "embedding": (nn.Embedding(5, 3), (3,)),
    "convolution": (nn.Conv2d(2, 3, 2), (1, 3, 1, 1)),
}


def magnitude(layer: nn.Module) -> torch.Tensor:
    model: Any = get_peft_model(nn.Sequential(layer), LoraConfig(r=1, target_modules=["0"], use_dora=True))  # type: ignore[arg-type]
    found: torch.Tensor = model.base_model.model[0].lora_magnitude_vector["default"].weight
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_magnitudes_of_blank_weights_are_blank(name: str) -> None:
    layer, shape = LAYERS[name]
    real: Any = layer.weight
    with unchanged(upstream), patches.transaction(ID, reason="test"):
        stock = magnitude(layer)
        assert stock.shape == shape
        assert stock.isfinite().all()
        layer.weight = nn.Parameter(torch.zeros(1).expand(real.shape))
        blank = magnitude(layer)
        assert blank.shape == shape
        assert blank.isnan().all()
        assert blank.requires_grad
    layer.weight = real
    assert torch.equal(magnitude(layer), stock)
