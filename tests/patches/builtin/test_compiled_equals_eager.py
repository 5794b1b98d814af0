from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError

import patches
from patches.builtin import BUILTIN
from tests.helpers.lookup import look_up

from .four_bit import dequantized, quantized, with_plain_weight

X = torch.linspace(-1, 1, 128).view(2, 64)


class Block(torch.nn.Module):
    """Two 4-bit layers, of which a patch may cover one, with something to trace around them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = quantized(64, 32)
        self.down = quantized(32, 64, seed=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) + x


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block() -> Block:
    return Block().train()  # in eval mode, stock layers repack their weights on some CPUs


def stock_output(model: Block) -> torch.Tensor:
    hidden = torch.relu(X @ dequantized(model.up).T)
    return hidden @ dequantized(model.down).T + X


def looked_up_output(model: Block) -> torch.Tensor:
    up, down = (look_up(layer.weight, layer.quant_state) for layer in (model.up, model.down))
    return torch.relu(X @ up.T) @ down.T + X


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="aot_eager", **options)


def graph_breaks(model: torch.nn.Module) -> tuple[int, int]:
    explained = torch._dynamo.explain(model)(X)
    return explained.graph_count, explained.graph_break_count


#: Change the values of the second layer, whose rows are half a block, where the CPU has AVX512.
MENDING = {"bitsandbytes.cpu-dequantize-flat", "bitsandbytes.cpu-matmul-flat"}


@pytest.mark.parametrize("patch_id", sorted(BUILTIN))
def test_each_patch(patch_id: str) -> None:
    model = block()
    stock = model(X)
    breaks = graph_breaks(model)
    torch.compiler.reset()
    expected = looked_up_output(model) if patch_id in MENDING else stock
    with patches.transaction(patch_id, reason="a test", force=True):
        assert torch.equal(model(X), expected)
        assert graph_breaks(model) == breaks
        torch.compiler.reset()
        assert torch.equal(compiled(model)(X), expected)
    assert torch.equal(compiled(model)(X), stock)


LAYER_PATCHES = ("bitsandbytes.linear4bit-shape", "bitsandbytes.no-rewrap", "bitsandbytes.keep-packing")


@pytest.mark.parametrize("covered", ["all", "up", "none"])
def test_the_patches_of_a_layer_together_in_one_graph(covered: str) -> None:
    model, elsewhere = block(), quantized(seed=2)
    layers = {"all": [model.up, model.down], "up": [model.up], "none": [elsewhere]}[covered]
    expected = model(X)
    with patches.transaction(*LAYER_PATCHES, reason="a test", on=layers, force=True):
        assert torch.equal(model(X), expected)
        assert torch.equal(compiled(model, fullgraph=True)(X), expected)
    torch.testing.assert_close(expected, stock_output(model))


def test_evaluation_of_a_covered_and_of_another_layer() -> None:
    covered, other, same_as_other = (quantized().eval() for _ in range(3))
    stock = compiled_outcome(same_as_other)
    torch.compiler.reset()
    with patches.transaction("bitsandbytes.keep-packing", reason="a test", on=[covered], force=True), torch.no_grad():
        packed = dequantized(covered)
        assert torch.equal(compiled(covered)(X), covered(X))
        assert torch.equal(dequantized(covered), packed)
        assert compiled_outcome(other) == stock


def compiled_outcome(layer: torch.nn.Module) -> str:
    """What a stock layer does when it is compiled for evaluation, whatever that is here.

    On some CPUs it repacks its weight, to the output of another, eager layer; with torch 2.14 Dynamo fails there,
    since it cannot trace `weight.data = ...` of a tensor subclass ("no attribute 'tp_descr_set_impl'").
    """
    eager = quantized().eval()
    with torch.no_grad():
        try:
            return f"as eager: {torch.equal(compiled(layer)(X), eager(X))}"
        except InternalTorchDynamoError as error:
            return str(error).partition("\n")[0]


def test_a_weight_that_lost_its_class_is_recovered_in_the_graph_as_in_eager() -> None:
    model = block()
    expected = model(X)
    for layer in (model.up, model.down):
        with_plain_weight(layer)
    with patches.transaction(*LAYER_PATCHES, reason="a test", on=[model.up, model.down], force=True):
        assert torch.equal(compiled(model)(X), expected)
        assert torch.equal(model(X), expected)


def test_applied_after_compilation() -> None:
    model = block()
    run = compiled(model)
    expected = run(X)
    with patches.transaction(*LAYER_PATCHES, reason="a test", on=[model.up], force=True):
        assert torch.equal(run(X), expected)
    assert torch.equal(run(X), expected)
