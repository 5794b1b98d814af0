"""Copies of a model are upstream's own, and building one draws the random numbers that upstream would."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.helpers.snapshot import Snapshot
from tests.surgery.lifetime.behaviour import (
    OBSERVED,
    PATCHED,
    assert_stock,
    behaviour,
    build,
    run,
    square,
    stock_layers,
)


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [deep_copied, saved_and_loaded])
def test_copy_is_not_patched(tiny: Path, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    stock = behaviour(stock_layers(OBSERVED))
    with build(tiny) as model:
        other = duplicate(model)
        assert isinstance(model, PeftModel)
        assert type(model) is not PeftModel
        assert type(other) is PeftModel
        assert not hasattr(other, "__enter__")
        assert torch.equal(run(model.train()), run(other.train()))
        layers = square(other)
        for layer in layers:  # pickling has lost the class, which `behaviour` starts from
            data, state = layer.weight.data, layer.quant_state
            layer.weight = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer)
        assert behaviour(layers) == stock
        assert behaviour(square(model)) == PATCHED


def test_copy_outlives_the_model(tiny: Path, unchanged: Snapshot) -> None:
    model = build(tiny)
    other = saved_and_loaded(model)
    expected = run(model)
    del model
    gc.collect()
    assert_stock(unchanged)
    assert torch.equal(run(other.train()), expected)


@pytest.mark.parametrize("adapted", [True, False])
def test_random_numbers_are_those_of_a_stock_build(tiny: Path, adapted: bool) -> None:
    """Probes and verifications draw none: the adapters, and what comes after, are those that PEFT alone would make."""
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    torch.manual_seed(0)
    stock = get_peft_model(base, lora, autocast_adapter_dtype=False) if adapted else base
    after = torch.rand(4)
    torch.manual_seed(0)
    with build(tiny, lora=lora if adapted else None) as model:
        assert torch.equal(torch.rand(4), after)
        expected = {name: p for name, p in stock.named_parameters() if "lora_" in name}
        found = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert found.keys() == expected.keys()
        assert len(found) == (28 if adapted else 0)
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter.to(torch.bfloat16), rtol=0, atol=0)
