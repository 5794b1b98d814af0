"""`bitsandbytes.cpu-dequantize-flat` and `bitsandbytes.cpu-matmul-flat`, which it needs, against a look-up in the code
table. On CPUs without AVX512 the defect is absent, and the probes say so.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn

import patches
from patches.builtin.bitsandbytes.cpu_dequantize_flat import dequantizes_with_wrong_statistics
from patches.builtin.bitsandbytes.cpu_matmul_flat import multiplies_by_wrong_weight
from tests.helpers.lookup import look_up, require_looked_up

from .four_bit import dequantized, quantized, unchanged

ID = "bitsandbytes.cpu-dequantize-flat"
HAS_DEFECT = torch.backends.cpu.get_cpu_capability() == "AVX512"

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Rows and columns; the last block of a weight is whole, or not; columns are even, or not, and multiples of 16, or not.
SHAPES = ((4, 16), (6, 96), (64, 96), (3, 80), (5, 102), (3, 65), (64, 33), (2, 3, 48), (1, 130))


def everywhere() -> patches.Transaction:
    return patches.transaction(ID, reason="a test", force=True)


def limited(*states: QuantState) -> patches.Transaction:
    return patches.transaction(patches.on(ID, states), reason="a test", force=True)


def packed_weight(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.Tensor, Any, Any]:
    """`(weight, packed, quant_state)`, the blocks of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 1, shape[0]).view(-1, *(1 for _ in shape[1:]))
    weight = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    packed, state = quantize_4bit(weight, **{"quant_type": "nf4", **options})
    return weight, packed, state


def is_wrong(packed: torch.Tensor, state: QuantState) -> bool:
    return bool((dequantize_4bit(packed, state).float() - look_up(packed, state)).abs().max() > 0.1)


def test_stock_is_wrong_where_the_cpu_has_avx512() -> None:
    _, packed, state = packed_weight(64, 96)
    x = torch.eye(96)
    assert is_wrong(packed, state) == HAS_DEFECT
    assert torch.equal(bnb.matmul_4bit(x, packed, state), dequantize_4bit(packed, state).t())
    assert dequantizes_with_wrong_statistics() == multiplies_by_wrong_weight() == HAS_DEFECT
    assert str(patches.verdict(ID)) == ("needed" if HAS_DEFECT else "obsolete")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_every_shape_is_what_the_table_gives(dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    for shape in SHAPES:
        for blocksize in (32, 64, 128, 256):
            for storage in (torch.uint8, dtype):
                options = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": blocksize}
                if -(-torch.Size(shape).numel() // 2) % storage.itemsize:
                    continue
                weight, packed, state = packed_weight(*shape, dtype=dtype, quant_storage=storage, **options)
                with everywhere():
                    require_looked_up(dequantize_4bit_of(packed, quant_state=state), packed, state, weight)


def dequantize_4bit_of(*args: Any, **kwargs: Any) -> torch.Tensor:
    """By the attribute that is patched; this module has a copy."""
    found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(*args, **kwargs)
    return found


def test_transposed_packed_data_gives_the_transposed_weight() -> None:
    _, packed, state = packed_weight(64, 96)
    with everywhere():
        assert torch.equal(dequantize_4bit_of(packed.t(), state), look_up(packed, state).t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_products_and_gradients_are_those_with_the_table(dtype: torch.dtype, nested: bool) -> None:
    """The weight comes in another dtype than it is multiplied in, and the bias is trained."""
    _, packed, state = packed_weight(40, 96, dtype=torch.float32, compress_statistics=nested)
    weight = look_up(packed, state).to(dtype)
    x, bias, seed = torch.randn(2, 3, 96, dtype=dtype), torch.randn(40, dtype=dtype), torch.randn(2, 3, 40, dtype=dtype)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    expected = nn.functional.linear(x, weight, bias)
    wanted = torch.autograd.grad(expected, leaves, seed)
    with everywhere():
        found = bnb.matmul_4bit(x, packed, state, bias=bias)
        got = torch.autograd.grad(found, leaves, seed)
        with torch.no_grad():
            filled = bnb.matmul_4bit(x, packed, quant_state=state, out=torch.empty_like(found), bias=bias)
    assert torch.equal(found, expected)
    assert torch.equal(filled, expected)
    torch.testing.assert_close(got, wanted)


def test_one_row_and_none() -> None:
    _, packed, state = packed_weight(40, 96)
    with everywhere():
        row = bnb.matmul_4bit(torch.ones(96), packed, state)
        nothing = bnb.matmul_4bit(torch.ones(0, 96, requires_grad=True), packed, state)
    torch.testing.assert_close(row, look_up(packed, state).sum(1))
    assert nothing.shape == (0, 40)


def test_layer_trains_and_evaluates_beside_a_stock_one() -> None:
    covered, stock = (quantized(96, 32, storage=torch.bfloat16).train() for _ in range(2))
    x = torch.randn(5, 96, requires_grad=True)
    before, weight = stock(x), dequantized(stock)
    expected = x @ look_up(covered.weight, covered.quant_state).t()
    keep = patches.on("bitsandbytes.keep-packing", [covered])
    with (
        unchanged(bnb, bitsandbytes.functional),
        limited(covered.quant_state),
        patches.transaction(keep, reason="a test", force=True),
    ):
        assert torch.equal(covered(x), expected)
        with torch.no_grad():
            assert torch.equal(covered.eval()(x), expected)
        assert torch.equal(stock(x), before)
        assert torch.equal(dequantized(stock), weight)
    assert torch.equal(covered.train()(x), before)
    assert bool((before - expected).abs().max() > 0.01) == HAS_DEFECT


def test_fused_experts_of_bitsandbytes() -> None:
    experts, weight = nn.Module(), torch.randn(3, 8, 48)
    experts.register_parameter("up", nn.Parameter(weight.clone()))
    replace_parameter_4bit(experts, "up")
    original: Any = experts.parametrizations
    packed, state = original.up.original, original.up[0].quant_state
    with limited(state):
        require_looked_up(experts.up, packed, state, weight)


@pytest.mark.parametrize("shape", [(7, 128), (64, 64), (1, 192)])
def test_rows_of_whole_blocks_are_stock_bit_for_bit(shape: tuple[int, int]) -> None:
    weight, packed, state = packed_weight(*shape, dtype=torch.bfloat16)
    x = torch.randn(4, shape[1])
    stock = dequantize_4bit(packed, state), bnb.matmul_4bit(x, packed, state)
    with everywhere():
        require_looked_up(dequantize_4bit_of(packed, state), packed, state, weight)
        assert torch.equal(dequantize_4bit_of(packed, state), stock[0])
        assert torch.equal(bnb.matmul_4bit(x, packed, state), stock[1])


def test_what_is_refused_upstream_is_refused_still() -> None:
    _, packed, state = packed_weight(4, 96)
    with everywhere():
        with pytest.raises(ValueError, match="requires both absmax and out"):
            dequantize_4bit_of(packed)
        with pytest.raises(NotImplementedError, match="CPU"):
            dequantize_4bit_of(packed, state, out=torch.empty(4, 96))
        with pytest.raises(ValueError, match="quant_state is required"):
            bnb.matmul_4bit(torch.ones(1, 96), packed, None)


def test_weights_repacked_by_an_evaluation_go_to_their_own_kernels() -> None:
    layer, same = (quantized(128, 32).eval() for _ in range(2))
    x = torch.randn(4, 128)
    with torch.no_grad():
        expected = same(x)
        with everywhere():
            assert torch.equal(layer(x), expected)
