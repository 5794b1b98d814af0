"""Quantizing in runs gives the bits that bitsandbytes gives for the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.quantizers import bnb
from surgery.quantizers.bnb import BnbQuantizer, packed_shape, quantize_in_runs

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STORAGES = (torch.uint8, *FLOATS)

#: What a block is multiplied by: nothing left of it, float32 that bfloat16 just holds, and numbers that vanish.
SCALES = (0.0, 1.0, 1e-3, 1e4, 1e-30, 1e30)

quants = st.builds(
    Quant,
    st.sampled_from(("nf4", "fp4")),
    blocksize=st.sampled_from((32, 64, 128, 1024)),
    double_quant=st.booleans(),
)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """A finite matrix, of any shape and dtype, some transposed, whose rows are of very different sizes."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 160))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scales = torch.tensor(draw(st.lists(st.sampled_from(SCALES), min_size=rows, max_size=rows)))
    largest = torch.finfo(dtype).max
    values = (torch.randn(rows, columns, generator=generator) * scales[:, None]).clamp(-largest, largest).to(dtype)
    return values.t() if draw(st.booleans()) else values


@contextmanager
def runs_of(elements: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bnb.RUN_ELEMENTS, "cpu", elements)
        yield


def assert_same_state(found: QuantState, expected: QuantState) -> None:
    found_dict, expected_dict = found.as_dict(), expected.as_dict()
    assert found_dict.keys() == expected_dict.keys()
    for key, value in expected_dict.items():
        if isinstance(value, torch.Tensor):
            assert found_dict[key].dtype == value.dtype, key
            assert torch.equal(found_dict[key], value), key
        else:
            assert found_dict[key] == value, key


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@settings(deadline=None, max_examples=300)
@given(
    weight=weights(),
    quant=quants,
    storage=st.sampled_from(STORAGES),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    run=st.sampled_from((1, 64, 100, 256, 4096)),
)
def test_runs_give_the_bits_of_the_whole(
    weight: torch.Tensor, quant: Quant, storage: torch.dtype, dtype: torch.dtype, run: int
) -> None:
    if ((weight.numel() + 1) // 2) % storage.itemsize:
        with pytest.raises(ConfigError, match="packs into"):
            packed_shape(weight.shape, storage)
        return
    expected, expected_state = quantize_4bit(
        weight.to(dtype).contiguous(),
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type,
        quant_storage=storage,
    )
    with runs_of(run):
        packed, state = quantize_in_runs(weight, quant, storage=storage, dtype=dtype, device=CPU)
        dropped, same_state = quantize_in_runs(
            weight, quant, storage=storage, dtype=dtype, device=CPU, keep_packed=False
        )
    assert packed.shape == packed_shape(weight.shape, storage)
    assert packed.dtype == storage
    assert torch.equal(as_bytes(packed), as_bytes(expected))
    assert_same_state(state, expected_state)
    assert dropped.is_meta
    assert (dropped.shape, dropped.dtype) == (packed.shape, storage)
    assert_same_state(same_state, expected_state)


def test_a_weight_of_many_default_runs_gives_the_bits_of_the_whole() -> None:
    elements = bnb.RUN_ELEMENTS["cpu"]
    weight = torch.randn(3, elements // 2 + 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, expected_state = quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16
    )
    packed, state = quantize_in_runs(weight, Quant(), storage=torch.bfloat16, dtype=torch.bfloat16, device=CPU)
    assert torch.equal(as_bytes(packed), as_bytes(expected))
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_quantized_module_equals_one_moved_by_bitsandbytes(
    quant_type: Any, double_quant: bool, blocksize: int, storage: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
    stock = Linear4bit(96, 40, bias=False, quant_storage=storage)
    stock.weight = Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
        module=stock,
    )
    stock.to("cpu")
    quant = Quant(quant_type, blocksize=blocksize, double_quant=double_quant, quant_storage=storage)
    quantizer = BnbQuantizer(quant=quant, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    ours: Any = quantizer.replacement(linear)
    assert ours.weight.is_meta
    with runs_of(1000):
        quantizer.quantize(ours, linear.weight.detach(), device=CPU, keep_packed=True)
    assert ours.weight.shape == stock.weight.shape
    assert torch.equal(as_bytes(ours.weight.data), as_bytes(stock.weight.data))
    assert_same_state(ours.quant_state, stock.weight.quant_state)
    assert ours.weight.quant_state is ours.quant_state
