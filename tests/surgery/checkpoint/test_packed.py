"""Packed weights of a checkpoint: found, checked before anything is read, and dequantized exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from tests.helpers.lookup import look_up

W = "layer.weight"
NF4 = f"{W}.quant_state.bitsandbytes__nf4"

Tensors = dict[str, torch.Tensor]


def packed(
    shape: tuple[int, ...] = (9, 50), *, dtype: torch.dtype = torch.bfloat16, name: str = W, **options: Any
) -> tuple[Tensors, Any, torch.Tensor]:
    """A weight as bitsandbytes saves it, its quant_state, and its packed bytes."""
    from bitsandbytes.functional import quantize_4bit

    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    data, state = quantize_4bit(values, **{"quant_type": "nf4", "compress_statistics": True, **options})
    return {name: data, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}, state, data


def save(tensors: Tensors, folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings(tensors: Tensors, **changes: Any) -> Tensors:
    content = {**json.loads(bytes(tensors[NF4])), **changes}
    text = json.dumps({key: value for key, value in content.items() if value is not ...})
    return {**tensors, NF4: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quant_type": "fp4", "compress_statistics": False, "blocksize": 128},
        {"quant_storage": torch.bfloat16, "shape": (10, 50)},
        {"shape": (64, 640), "dtype": torch.float16},
        {"shape": (1, 1), "dtype": torch.float32},
    ],
    ids=["odd", "fp4-single-128", "bf16-storage", "many-nested-blocks", "one-element"],
)
def test_dequantized_by_ranges_is_the_look_up(options: dict[str, Any], tmp_path: Path) -> None:
    tensors, state, data = packed(**options)
    checkpoint = Checkpoint.open(save(tensors, tmp_path))
    weight = checkpoint.packed[W]
    assert checkpoint.weights() == (W,)
    assert checkpoint.logical(W).shape == tuple(state.shape)
    wanted = look_up(data, state).to(state.dtype).view(-1)
    with checkpoint.reader() as reader:
        for start, stop in ((0, wanted.numel()), (wanted.numel() // 3, wanted.numel() - 1), (0, 1)):
            found = weight.dequantize(reader.read_range, start, stop)
            assert found.dtype == state.dtype
            assert torch.equal(found, wanted[start:stop])


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def cut(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[name].view(-1)[:-1].clone()}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut(f"{W}.absmax"), f"expected {W}.absmax to have 8 elements of uint8"),
        (cut(W), f"expected {W} to have 225 elements of uint8.*found 224"),
        (cut(f"{W}.nested_absmax"), f"expected {W}.nested_absmax to have 1 elements of float32"),
        (cut(f"{W}.quant_map"), f"expected {W}.quant_map to have 16 elements of float32"),
        (drop(NF4), "expected one layer.weight.quant_state.bitsandbytes__nf4 or fp4, found none"),
        (drop(f"{W}.absmax"), f"{W}.absmax is missing"),
        (drop(f"{W}.nested_quant_map"), "nested_absmax or _quant_map is missing"),
        (drop(W), f"no tensor {W}"),
        (lambda t: {**t, f"{W}.absmax": t[f"{W}.absmax"].float()}, "expected .*absmax to have 8 elements of uint8"),
        (lambda t: {**t, NF4: torch.zeros(3, dtype=torch.uint8)}, "does not have the settings"),
        (
            lambda t: {**t, NF4.replace("nf4", "fp4"): t[NF4].clone()},
            "expected one .* found .*nf4.*,.*fp4|found .*fp4, .*nf4",
        ),
        (lambda t: settings(t, blocksize=0), "blocksize to be one of 32, .*, 4096, found 0"),
        (lambda t: settings(t, blocksize=63), "blocksize to be one of 32, .*, 4096, found 63"),
        (lambda t: settings(t, nested_blocksize=255), "nested_blocksize to be one of .* found 255"),
        (lambda t: settings(t, blocksize=..., dtype=...), "it has no blocksize, dtype"),
        (lambda t: settings(t, blocksize=128), "absmax to have 4 elements"),
        (lambda t: settings(t, shape=[9, 51]), "expected layer.weight to have 230 elements"),
        (lambda t: settings(t, shape=None), "shape to be numbers above 0, found None"),
        (lambda t: settings(t, shape=[True, 450]), r"above 0, found \[True, 450\]"),
        (lambda t: settings(t, dtype="int8"), "dtype to be float16 or .*, found 'int8'"),
        (lambda t: settings(t, quant_type="fp4"), "quant_type 'fp4' under the name of 'nf4'"),
        (lambda t: settings(t, nested_blocksize=...), "differ in whether absmax is quantized too"),
        (lambda t: settings(t, nested_offset=float("nan")), "finite in float32, found nan"),
        (lambda t: settings(t, nested_offset=1e300), r"finite in float32, found 1e\+300"),
        (lambda t: settings(t, nested_offset="0.5"), "finite in float32, found '0.5'"),
        (lambda t: settings(t, nested_dtype="float16"), "nested_dtype 'float16'"),
    ],
)
def test_broken_ones_are_refused_before_a_weight_is_read(
    damage: Callable[[Tensors], Tensors], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint.open(save(damage(packed()[0]), tmp_path))
    assert caught.value.tensor == W


def test_two_kinds_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    other, _, _ = packed(name="other.weight", blocksize=128)
    with pytest.raises(CheckpointError, match="are of 2 kinds"):
        Checkpoint.open(save({**packed()[0], **other}, tmp_path))


def test_a_config_that_says_packed_and_weights_that_are_not(tmp_path: Path) -> None:
    content: dict[str, dict[str, Any]] = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"in 4 bits of .* none of its tensors is.*quant_state"):
        Checkpoint.open(save({W: torch.ones(2, 2)}, tmp_path))
    del content["quantization_config"]["load_in_4bit"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"in 4 or 8 bits of .* none of its tensors is"):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(save(packed()[0], tmp_path)).packed.keys() == {W}


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("fp8", r"fp8.*FineGrainedFP8Config\(dequantize=True\)"),
        ("mxfp4", r"MXFP4.*Mxfp4Config\(dequantize=True\)"),
        ("compressed-tensors", "compressed-tensors"),
        ("hqq", "hqq"),
    ],
)
def test_others_are_refused_by_name_with_what_to_do(method: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match=f"quantized already, in {says}"):
        Checkpoint.open(save({W: torch.ones(2, 2)}, tmp_path))
