"""`bitsandbytes.linear4bit-shape` in one process; under FSDP it is tried in `test_fsdp_reads`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

import patches
from patches.builtin.bitsandbytes.linear4bit_shape import weight_loses_its_class

from .four_bit import dequantized, quantized, unchanged, with_plain_weight

ID = "bitsandbytes.linear4bit-shape"


def reading(*layers: Linear4bit) -> Any:
    return patches.transaction(patches.on(ID, layers), reason="test")


def test_stock_layer_reads_and_saves_a_plain_parameter() -> None:
    layer = with_plain_weight(quantized())
    assert type(layer.weight) is nn.Parameter
    assert list(layer.state_dict()) == ["weight"]
    assert weight_loses_its_class()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_plain_parameter_reads_as_params4bit_beside_a_stock_layer(storage: torch.dtype, nested: bool) -> None:
    covered = with_plain_weight(quantized(65, 7, storage=storage, compress_statistics=nested))
    stock = with_plain_weight(quantized())
    stored, address = covered.weight, covered.weight.data_ptr()
    with unchanged(Linear4bit), reading(covered):
        weight = covered.weight
        assert type(stock.weight) is nn.Parameter
    assert type(weight) is Params4bit
    assert weight is stored
    assert weight.data_ptr() == address
    assert weight.quant_state is covered.quant_state
    assert weight.module is covered
    assert (weight.blocksize, weight.quant_type, weight.compress_statistics) == (64, "nf4", nested)
    assert weight.quant_storage == storage
    assert weight.bnb_quantized
    assert not weight.requires_grad


def test_one_tensor_stored_in_two_layers_is_one_tensor_when_read() -> None:
    first, second = with_plain_weight(quantized()), quantized()
    second.weight = first.weight
    with reading(first, second):
        assert first.weight is second.weight


def test_plain_tensor_in_the_instance_dict_reads_as_params4bit() -> None:
    layer = quantized()
    view = layer.weight.data
    del layer.weight
    with reading(layer):
        layer.weight = view
        weight = layer.weight
        assert type(weight) is Params4bit
        assert weight.quant_state is layer.quant_state
        assert weight.data_ptr() == view.data_ptr()
        assert vars(layer)["weight"] is view
        assert type(view) is torch.Tensor
        assert list(layer.parameters()) == []
        assert "weight" not in layer._parameters
        del layer.weight
        assert not hasattr(layer, "weight")


def test_view_of_something_trainable_keeps_its_history() -> None:
    """FSDP1 with `use_orig_params=True` may flatten frozen and trainable parameters together."""
    layer = quantized()
    flat = torch.randn(layer.weight.numel(), requires_grad=True)
    del layer.weight
    layer.weight = view = flat.view(-1, 1)
    with reading(layer):
        assert type(layer.weight) is Params4bit
        assert not layer.weight.requires_grad
    assert layer.weight is view
    assert view.requires_grad
    assert view.grad_fn is not None


def test_meta_weight_of_logical_shape_reads_and_is_stored_packed() -> None:
    layer = quantized(storage=torch.bfloat16)
    shape = layer.weight.shape
    fresh = Linear4bit(64, 32, bias=False, quant_type="nf4", quant_storage=torch.bfloat16, device="meta")
    for stored in (nn.Parameter(torch.empty(32, 64, device="meta"), requires_grad=False), fresh.weight):
        layer.weight = stored
        with reading(layer):
            assert type(layer.weight) is Params4bit
        parameter = next(layer.parameters())
        assert (parameter.shape, parameter.dtype, parameter.is_meta) == (shape, torch.bfloat16, True)


class Sharded(torch.Tensor):
    """Stands for DTensor: a subclass of Tensor that is not ours to change."""


@pytest.mark.parametrize("shape", ["flat shard", "empty shard", "logical", "subclass"])
def test_what_is_no_packed_weight_is_returned_as_it_is(shape: str) -> None:
    layer = quantized()
    packed = layer.weight.data
    stored = {
        "flat shard": nn.Parameter(packed.view(-1)[:100], requires_grad=False),
        "empty shard": nn.Parameter(packed.view(-1)[:0], requires_grad=False),
        "logical": nn.Parameter(torch.zeros(32, 64)),
        "subclass": packed.as_subclass(Sharded),
    }[shape]
    del layer.weight
    layer.weight = stored
    before = type(stored)
    with reading(layer):
        assert layer.weight is stored
    assert type(stored) is before
    assert not hasattr(stored, "quant_state")


def test_params4bit_with_its_own_quant_state_is_kept_although_the_module_has_another() -> None:
    layer = quantized()
    own, layer.quant_state = layer.weight.quant_state, quantized(seed=1).quant_state
    with reading(layer):
        assert layer.weight.quant_state is own


def test_layer_that_is_not_quantized_yet_is_stock() -> None:
    layer = Linear4bit(64, 32, bias=False)
    stored = layer.weight
    with reading(layer):
        assert layer.weight is stored
        assert layer.weight.shape == (32, 64)
        assert layer.weight.quant_state is None


def test_forward_is_the_same_and_replaces_nothing() -> None:
    layer = with_plain_weight(quantized())
    stored, expected = layer.weight, quantized()(torch.ones(2, 64))
    with reading(layer):
        assert torch.equal(layer(torch.ones(2, 64)), expected)
    assert layer._parameters["weight"] is stored


def test_state_dict_has_the_quant_state() -> None:
    expected = quantized().state_dict()
    layer = with_plain_weight(quantized())
    with reading(layer):
        saved = layer.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_copies_and_pickles_are_made_and_not_covered() -> None:
    layer = with_plain_weight(quantized())
    with reading(layer):
        for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(with_plain_weight(made).weight) is nn.Parameter
            assert torch.equal(made.weight.data, layer.weight.data)


def test_parameters_are_registered_replaced_and_deleted_as_before() -> None:
    layer, replacement = quantized(), quantized(seed=1).weight
    with reading(layer):
        layer.weight = replacement
        assert layer._parameters["weight"] is replacement
        assert "weight" not in vars(layer)
        with pytest.raises(KeyError, match="already exists"):
            layer.register_buffer("weight", torch.zeros(1))
        del layer.weight
        assert "weight" not in layer._parameters
        layer.register_parameter("weight", replacement)
        assert layer.weight is replacement


def test_dequantization_by_peft() -> None:
    layer = with_plain_weight(quantized())
    with reading(layer):
        assert torch.equal(dequantize_bnb_weight(layer.weight), dequantized(layer))


def test_merge_by_peft() -> None:
    def merged(*, plain: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model: Any = nn.Module()
        model.config, model.is_loaded_in_4bit = {"model_type": "custom"}, True
        model.proj = quantized()
        adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
        layer = adapted.base_model.model.proj
        base = with_plain_weight(layer.base_layer) if plain else layer.base_layer
        with reading(base), pytest.warns(UserWarning, match="rounding errors"):
            layer.merge()
        return dequantized(base)

    assert torch.equal(merged(plain=True), merged(plain=False))


def test_compiled_forward_equals_eager() -> None:
    layer, x = quantized(), torch.ones(2, 64)
    expected = layer(x)
    with reading(layer):
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
    torch.compiler.reset()
