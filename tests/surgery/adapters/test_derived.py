"""Magnitudes and rows come out of parts, wherever these are cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.adapters.derived import Magnitude, Rows
from surgery.config import Quant
from surgery.quantizers.base import format_for
from tests.helpers.models import save_tiny


@settings(deadline=None)  # on a busy machine one call may wait for seconds
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 63), max_size=4),
    transposed=st.booleans(),
    adapted=st.booleans(),
)
def test_magnitudes(*, rows: int, columns: int, cuts: list[int], transposed: bool, adapted: bool) -> None:
    torch.manual_seed(0)
    weight, delta = torch.randn(rows, columns), (torch.randn(rows, 2), torch.randn(2, columns))
    magnitude = Magnitude(base=nn.Identity(), places=(), transposed=transposed, delta=delta if adapted else None)
    sums = magnitude.empty(weight.shape, weight.dtype, weight.device)
    ends = sorted({0, weight.numel(), *(cut for cut in cuts if cut < weight.numel())})
    for start, stop in itertools.pairwise(ends):
        magnitude.look(sums, weight.view(-1)[start:stop], start, weight.shape)
    whole = weight + delta[0] @ delta[1] if adapted else weight
    expected = torch.linalg.norm(whole, dim=0 if transposed else 1)
    assert torch.allclose(magnitude.value(sums, weight.dtype), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 3).to(dtype)
    rows = Rows(base=nn.Identity(), places=(), indices=(6, 0, 3, 0))
    found = [rows.empty(weight.shape, dtype, weight.device) for _ in range(3)]
    for part, (start, stop) in zip(found, [(0, 3), (3, 6), (6, 7)], strict=True):
        rows.look(part, weight[start:stop].reshape(-1), 3 * start, weight.shape)
    assert torch.equal(rows.value(found[0] + found[1] + found[2], dtype), weight[[6, 0, 3, 0]])


@settings(deadline=None)  # the first call sets up bitsandbytes
@given(start=st.integers(0, 1150), count=st.integers(1, 1152), double=st.booleans(), dtype=st.sampled_from(["f", "b"]))
def test_any_bytes_are_dequantized_as_forward_does(*, start: int, count: int, double: bool, dtype: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(18, 128, dtype=torch.float32 if dtype == "f" else torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    part = packed.view(-1)[start : start + count]
    quant = format_for(Quant(double_quant=double), dtype=weight.dtype)
    found = quant.dequantize(part, 2 * start, state)
    assert torch.equal(found, dequantize_4bit(packed, state).view(-1)[2 * start : 2 * (start + part.numel())])


def test_magnitudes_of_what_is_packed_already(tmp_path: Path) -> None:
    """The same as of what is quantized while it is loaded, and norms of what PEFT dequantizes."""
    from peft import LoraConfig
    from peft.utils.integrations import dequantize_module_weight

    base = save_tiny(tmp_path / "base", intermediate_size=128)
    surgery.quantize(base, tmp_path / "packed", report=surgery.Report())
    lora, found = LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True), []
    for folder in (base, tmp_path / "packed"):
        with surgery.qlora(folder, lora=lora, placement="rank0-cpu", report=surgery.Report()) as model:
            layers: list[Any] = [module for module in model.modules() if getattr(module, "lora_magnitude_vector", None)]
            for layer in layers:
                norms = torch.linalg.norm(dequantize_module_weight(layer.get_base_layer()), dim=1)
                found.append(layer.lora_magnitude_vector["default"].weight.detach())
                assert torch.equal(found[-1], norms)
    assert len(found) == 8
    assert all(torch.equal(*pair) for pair in zip(found[:4], found[4:], strict=True))
