"""`torch.meta-param-replacement`."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

import patches
from patches.builtin.torch.meta_param_replacement import to_meta_fails_for_subclass

from .four_bit import quantized, unchanged

ID = "torch.meta-param-replacement"


def model_of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers)


def test_stock_move_raises_and_has_destroyed_the_quant_state() -> None:
    layer = quantized()
    with pytest.raises(RuntimeError, match="instance of type Params4bit"):
        model_of(layer).to("meta")
    assert layer.quant_state.absmax.is_meta
    assert to_meta_fails_for_subclass()


def test_whole_model_moves_beside_a_stock_one() -> None:
    covered, stock = model_of(quantized(bias=True)), model_of(quantized())
    layer = covered[1]
    weight, attributes, packed = layer.weight, dict(vars(layer.weight)), layer.weight.data.clone()
    with unchanged(nn.Module, Linear4bit), patches.transaction(patches.on(ID, [covered]), reason="test"):
        covered.to("meta")
        with pytest.raises(RuntimeError, match="instance of type Params4bit"):
            stock.to("meta")
    assert all(parameter.is_meta for parameter in covered.parameters())
    moved = layer.weight
    assert type(moved) is Params4bit
    assert moved is not weight
    assert moved.shape == weight.shape
    assert all(vars(moved)[name] is value for name, value in attributes.items())
    assert type(layer.bias) is type(covered[0].weight) is nn.Parameter
    assert not layer.quant_state.absmax.is_meta
    assert not layer.quant_state.state2.absmax.is_meta
    assert torch.equal(weight.data, packed)
    assert vars(weight) == attributes


def test_everywhere_without_a_scope() -> None:
    with unchanged(nn.Module), patches.transaction(ID, reason="test"):
        layer = quantized().to("meta")
        assert type(layer.weight) is Params4bit
        assert layer.weight.is_meta
        assert not layer.quant_state.absmax.is_meta


def test_shared_weight_stays_shared() -> None:
    first, second = quantized(), quantized()
    second.weight = first.weight
    model = model_of(first, second)
    with patches.transaction(ID, reason="test"):
        model.to("meta")
    assert model[1].weight is model[2].weight


def test_to_empty_on_meta_keeps_the_class_too() -> None:
    layer = quantized()
    with patches.transaction(ID, reason="test"):
        layer.to_empty(device="meta")
    assert type(layer.weight) is Params4bit
    assert layer.weight.quant_state is layer.quant_state


def test_gradient_follows() -> None:
    class Special(nn.Parameter):
        pass

    module = nn.Module()
    module.weight = Special(torch.ones(2))
    module.weight.grad = torch.ones(2)
    with patches.transaction(ID, reason="test"):
        module.to("meta")
    assert type(module.weight) is Special
    assert module.weight.grad.is_meta


def test_plain_and_lazy_parameters_and_other_devices_are_stock() -> None:
    plain, layer = nn.Linear(2, 2), quantized()
    stock_lazy = nn.LazyLinear(2).to("meta")
    weight, packed = layer.weight, layer.weight.data.clone()
    with patches.transaction(ID, reason="test"):
        assert type(plain.to("meta").weight) is nn.Parameter
        assert type(nn.LazyLinear(2).to("meta").weight) is type(stock_lazy.weight)
        layer.to("cpu")
    assert layer.weight is weight
    assert torch.equal(layer.weight.data, packed)


def test_with_linear4bit_apply_in_either_order() -> None:
    apply_id = "bitsandbytes.linear4bit-apply"
    for ids in ((ID, apply_id), (apply_id, ID)):
        layer = quantized()
        with unchanged(nn.Module, Linear4bit), patches.transaction(*ids, reason="test"):
            layer.to("meta").to_empty(device="cpu")
        assert type(layer.weight) is Params4bit
        assert layer.weight.quant_state is layer.quant_state
