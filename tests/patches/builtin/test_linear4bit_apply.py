"""`bitsandbytes.linear4bit-apply`."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

import patches
from patches.builtin.bitsandbytes.linear4bit_apply import to_empty_loses_class

from .four_bit import on_meta, quantized, unchanged

ID = "bitsandbytes.linear4bit-apply"
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def test_to_empty_of_a_stock_layer_gives_a_plain_parameter() -> None:
    assert type(on_meta(quantized()).to_empty(device="cpu").weight) is nn.Parameter
    assert to_empty_loses_class()


@pytest.mark.parametrize("storage", STORAGES)
def test_to_empty_keeps_class_shape_and_quant_state_beside_a_stock_layer(storage: torch.dtype) -> None:
    covered, stock = on_meta(quantized(storage=storage)), on_meta(quantized(storage=storage))
    shape, quant_state = covered.weight.shape, covered.quant_state
    with unchanged(Linear4bit), patches.transaction(patches.on(ID, [covered]), reason="test"):
        covered.to_empty(device="cpu")
        stock.to_empty(device="cpu")
    weight = covered.weight
    assert type(weight) is Params4bit
    assert not weight.is_meta
    assert not weight.requires_grad
    assert (weight.shape, weight.dtype, weight.quant_storage) == (shape, storage, storage)
    assert weight.quant_state is quant_state
    assert weight.module is covered
    assert weight.bnb_quantized
    assert type(stock.weight) is nn.Parameter


def test_meta_weight_of_logical_shape_is_packed_before_memory_is_allocated() -> None:
    layer = quantized(65, 3, storage=torch.bfloat16)
    shape = layer.weight.shape
    layer.weight = nn.Parameter(torch.empty(3, 65, device="meta"), requires_grad=False)
    with patches.transaction(patches.on(ID, [layer]), reason="test"):
        layer.to_empty(device="cpu")
    assert (layer.weight.shape, layer.weight.dtype) == (shape, torch.bfloat16)
    assert layer.weight.quant_state is layer.quant_state


def test_reached_from_the_model_that_holds_the_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), on_meta(quantized()))
    with patches.transaction(patches.on(ID, [model[1]]), reason="test"):
        model.to_empty(device="cpu")
    assert type(model[1].weight) is Params4bit
    assert type(model[0].weight) is nn.Parameter
    assert not model[0].weight.is_meta


def test_quant_state_of_the_weight_comes_before_a_stale_one_of_the_module() -> None:
    layer = on_meta(quantized())
    own, layer.quant_state = layer.quant_state, quantized(seed=1).quant_state
    with patches.transaction(patches.on(ID, [layer]), reason="test"):
        layer.to_empty(device="cpu")
    assert layer.weight.quant_state is own


def test_quantizing_is_stock() -> None:
    torch.manual_seed(0)
    layer = Linear4bit(64, 32, bias=False, quant_type="nf4", quant_storage=torch.float32)
    with patches.transaction(patches.on(ID, [layer]), reason="test"):
        layer.to("cpu")
    expected = quantized()
    assert torch.equal(layer.weight.data, expected.weight.data)
    assert torch.equal(layer.quant_state.absmax, expected.quant_state.absmax)
