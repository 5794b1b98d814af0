"""`bitsandbytes.no-rewrap`."""

from __future__ import annotations

import logging

import bitsandbytes.nn.modules as upstream
import pytest
import torch
from bitsandbytes.nn import Embedding4bit, Params4bit
from torch import nn

import patches
from patches.builtin.bitsandbytes.no_rewrap import recovery_replaces_weight

from .four_bit import quantized, unchanged, with_plain_weight

ID = "bitsandbytes.no-rewrap"


def test_stock_forward_registers_another_parameter() -> None:
    layer = with_plain_weight(quantized())
    before = layer.weight
    layer(torch.ones(1, 64))
    assert layer.weight is not before
    assert type(layer.weight) is Params4bit
    assert recovery_replaces_weight()


def test_covered_layer_keeps_its_parameter_beside_a_stock_one() -> None:
    covered, stock = with_plain_weight(quantized()), with_plain_weight(quantized())
    before = covered.weight
    expected = quantized()(torch.ones(1, 64))
    with unchanged(upstream), patches.transaction(patches.on(ID, [covered]), reason="test"):
        assert torch.equal(covered(torch.ones(1, 64)), expected)
        assert torch.equal(stock(torch.ones(1, 64)), expected)
    assert covered.weight is before
    assert type(before) is nn.Parameter
    assert before.quant_state is covered.quant_state
    assert type(stock.weight) is Params4bit


def test_a_tensor_that_is_no_parameter_is_not_registered() -> None:
    """FSDP1 puts plain views on the module while it computes; recovering must not add them to
    `parameters()`."""
    layer = quantized()
    view = layer.weight.data
    del layer.weight
    layer.weight = view
    with patches.transaction(ID, reason="test"):
        layer(torch.ones(1, 64))
    assert list(layer.parameters()) == []
    assert layer.weight is view


def test_embedding_is_covered_too() -> None:
    layer = Embedding4bit(8, 64, dtype=torch.float32, quant_type="nf4", quant_storage=torch.float32).to("cpu")
    expected = layer(torch.tensor([3]))
    layer.weight = before = nn.Parameter(layer.weight.data, requires_grad=False)
    with patches.transaction(ID, reason="test"):
        assert torch.equal(layer(torch.tensor([3])), expected)
    assert layer.weight is before


def test_layer_without_quant_state_gets_the_stock_complaint(caplog: pytest.LogCaptureFixture) -> None:
    layer = with_plain_weight(quantized())
    layer.quant_state = None
    with (
        patches.transaction(ID, reason="test"),
        caplog.at_level(logging.WARNING, logger="bitsandbytes"),
        pytest.raises((AttributeError, ValueError)),
    ):
        layer(torch.ones(1, 64))
    assert "not initialized" in caplog.text


def test_weight_that_is_not_packed_gets_the_stock_error() -> None:
    layer = quantized()
    layer.weight = nn.Parameter(torch.zeros(32, 64), requires_grad=False)
    with patches.transaction(ID, reason="test"), pytest.raises(AssertionError):
        layer(torch.ones(1, 64))


def test_compiled_forward_equals_eager() -> None:
    layer, x = with_plain_weight(quantized()), torch.ones(2, 64)
    expected = quantized()(x)
    with patches.transaction(ID, reason="test"):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        assert type(layer.weight) is nn.Parameter
    torch.compiler.reset()
