"""`bitsandbytes.params4bit-to-meta`."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Params4bit

import patches
from patches.builtin.bitsandbytes.params4bit_to_meta import to_meta_moves_quant_state

from .four_bit import quantized, unchanged

ID = "bitsandbytes.params4bit-to-meta"


def test_stock_move_destroys_the_shared_quant_state() -> None:
    layer = quantized()
    layer.weight.to("meta")
    assert layer.quant_state.absmax.is_meta
    assert layer.quant_state.state2.absmax.is_meta
    assert to_meta_moves_quant_state()


def test_meta_weight_has_every_attribute_and_the_original_is_untouched() -> None:
    covered, stock = quantized(), quantized()
    before, attributes = covered.weight.data.clone(), dict(vars(covered.weight))
    with unchanged(Params4bit), patches.transaction(patches.on(ID, [covered.weight]), reason="test"):
        moved = covered.weight.to("meta")
        stock.weight.to("meta")
    assert type(moved) is Params4bit
    assert moved.is_meta
    assert moved.shape == covered.weight.shape
    assert {name: value is attributes[name] for name, value in vars(moved).items()} == dict.fromkeys(attributes, True)
    assert torch.equal(covered.weight.data, before)
    assert vars(covered.weight) == attributes
    assert not covered.quant_state.absmax.is_meta
    assert stock.quant_state.absmax.is_meta


def test_attributes_that_others_put_there_are_kept() -> None:
    layer = quantized()
    layer.weight.put_by_a_trainer = 1
    with patches.transaction(ID, reason="test"):
        assert layer.weight.to(device="meta").put_by_a_trainer == 1


def test_move_with_a_dtype_gives_that_dtype() -> None:
    with patches.transaction(ID, reason="test"):
        moved = quantized().weight.to("meta", torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert moved.quant_state is not None


def test_other_moves_are_stock() -> None:
    layer = quantized()
    expected = layer.weight.to("cpu")
    with patches.transaction(ID, reason="test"):
        moved, cast = layer.weight.to("cpu"), layer.weight.to(torch.bfloat16)
    assert vars(moved).keys() == vars(expected).keys()
    assert moved.module is expected.module is None
    assert torch.equal(moved.data, expected.data)
    assert type(cast) is Params4bit
    assert cast.dtype == torch.bfloat16
