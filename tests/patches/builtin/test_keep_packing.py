"""`bitsandbytes.keep-packing`. Where the CPU has no AVX512-BF16 the defect is absent, and the probe says
so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit

import patches
from patches.builtin.bitsandbytes.keep_packing import evaluation_repacks
from patches.errors import IncompatibleError

from .four_bit import quantized, unchanged

ID = "bitsandbytes.keep-packing"


def evaluate(layer: Linear4bit) -> torch.Tensor:
    with torch.no_grad():
        return layer.eval()(torch.ones(2, 64))


def is_repacked(layer: Linear4bit) -> bool:
    return getattr(layer.quant_state, "packing_format_for_cpu", False)


def test_evaluation_repacks_a_stock_layer_where_the_cpu_can() -> None:
    layer = quantized()
    evaluate(layer)
    assert is_repacked(layer) == has_avx512bf16() == evaluation_repacks()


def test_covered_layer_keeps_weight_and_quant_state_beside_a_stock_one() -> None:
    covered, stock = quantized(), quantized()
    packed, absmax = covered.weight.data.clone(), covered.quant_state.absmax.clone()
    with unchanged(Linear4bit), patches.transaction(patches.on(ID, [covered]), reason="test", force=True):
        evaluate(covered)
        evaluate(stock)
    assert torch.equal(covered.weight.data, packed)
    assert torch.equal(covered.quant_state.absmax, absmax)
    assert is_repacked(stock) == has_avx512bf16()


def test_evaluation_equals_training_forward() -> None:
    layer = quantized()
    expected = layer(torch.ones(2, 64))
    with patches.transaction(patches.on(ID, [layer]), reason="test", force=True):
        assert torch.equal(evaluate(layer), expected)


def test_repacked_layer_is_refused() -> None:
    layer = quantized()
    layer.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets when it repacks
    with (
        patches.transaction(patches.on(ID, [layer]), reason="test", force=True),
        pytest.raises(IncompatibleError, match="quantize or load the layer again"),
    ):
        evaluate(layer)


def test_layers_are_made_and_copied_as_before_while_active() -> None:
    with unchanged(Linear4bit), patches.transaction(ID, reason="test", force=True):
        layer = quantized()
        assert not layer.support_avx512bf16_for_cpu
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for made in (layer, copied, pickled):
        assert made.support_avx512bf16_for_cpu == has_avx512bf16()
