"""Quantized on disk: the files of transformers, bit for bit, from any number of ranks; and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import surgery
from surgery.checkpoint import Checkpoint
from surgery.cli import app
from surgery.errors import ConfigError, ExportError
from surgery.telemetry.report import Report
from tests.helpers.hub_server import HubServer
from tests.helpers.models import save_in_8_bits, save_tiny
from tests.helpers.ranks import run_ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"hidden_size": 63, "num_attention_heads": 3},  # Conv1D, tied, odd numbers of elements
    "qwen2": {},  # biases
    "phi": {},  # biases everywhere, of the head too
    "gemma2": {"head_dim": 16},  # tied
    "mixtral": {},  # experts, merged by transformers
    "gpt_neox": {},
    "opt": {},
    "bloom": {},
    "olmo2": {},
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def described(found: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (each.dtype, each.shape, each.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, each in found.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def stock(source: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(load_in_4bit=True, **{**defaults, **options})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype, device_map="cpu")


def require_same(source: Path, folder: Path, model: Any, *, without: tuple[str, ...] = ()) -> None:
    """Compare `folder`, made of `source`, with what transformers writes of `model`, and computes with each."""
    model.save_pretrained(source.with_name("stock"))
    assert described(tensors(folder)) == described(tensors(source.with_name("stock")))
    found, expected = (config_of(each)["quantization_config"] for each in (folder, source.with_name("stock")))
    assert {**found, **dict.fromkeys(without)} == {**expected, **dict.fromkeys(without)}
    ids = torch.arange(2, 40).view(2, -1)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family, **FAMILIES[family])
    folder = surgery.quantize(source, tmp_path / "out", quant=surgery.Quant(experts=False))
    require_same(source, folder, stock(source))


@pytest.mark.parametrize(
    ("quant", "dtype", "of_stock"),
    [
        (
            surgery.Quant("fp4", double_quant=False),
            torch.float16,
            {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        ),
        (
            surgery.Quant(skip_modules=(r"h\.1\.attn",), quant_storage=torch.bfloat16),
            torch.bfloat16,
            {"llm_int8_skip_modules": ["lm_head", "transformer.h.1.attn"], "bnb_4bit_quant_storage": torch.bfloat16},
        ),
    ],
)
def test_options_are_those_of_transformers(
    quant: surgery.Quant, dtype: torch.dtype, of_stock: dict[str, Any], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", "gpt2")
    folder = surgery.quantize(source, tmp_path / "out", quant=quant, dtype=dtype, verify=True)
    require_same(source, folder, stock(source, dtype, **of_stock), without=("llm_int8_skip_modules",))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_values_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    """Those that the source has, and those beyond the dtype; quantized or not, and on the way back."""
    source = save_tiny(tmp_path / "source", shard_size="1GB")
    found = tensors(source)
    found[name].view(-1)[5] = 1e6
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"{name}: expected finite numbers, found 1 of .*float16 holds"):
        surgery.quantize(source, tmp_path / "out", dtype=torch.float16)
    packed = surgery.quantize(source, tmp_path / "packed")
    with pytest.raises(ExportError, match=f"{name}: expected finite numbers"):
        surgery.dequantize(packed, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_from_16_bits_comes_back_within_half_a_step(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt2", torch_dtype="bfloat16")
    (source / "tokenizer.json").write_text("{}")
    packed = surgery.quantize(source, tmp_path / "packed", quant=surgery.Quant(blocksize=32, double_quant=False))
    back = surgery.dequantize(packed, tmp_path / "back", verify=True)

    before, after = tensors(source), tensors(back)
    assert {name: (each.dtype, each.shape) for name, each in before.items()} == {
        name: (each.dtype, each.shape) for name, each in after.items()
    }
    packed_names = {name.removesuffix(".absmax") for name in tensors(packed) if name.endswith(".absmax")}
    assert len(packed_names) == 8
    for name, values in before.items():
        step = 0.16 * values.float().abs().max() if name in packed_names else 0
        assert (after[name].float() - values.float()).abs().max() <= step, name
    assert "quantization_config" not in config_of(back)
    assert (back / "tokenizer.json").read_text() == "{}"
    again = surgery.quantize(back, tmp_path / "again", quant=surgery.Quant(blocksize=32, double_quant=False))
    for name, (_, _, data) in described(tensors(packed)).items():
        assert name.endswith(("absmax", "weight")) or described(tensors(again))[name][2] == data


def test_a_job_that_was_stopped_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt2", **FAMILIES["gpt2"])
    expected = contents(surgery.quantize(source, tmp_path / "whole", max_shard_bytes=40_000))
    with pytest.raises(surgery.PassError, match="a disk that fails"):
        surgery.quantize(source, tmp_path / "out", max_shard_bytes=40_000, report=Failing())
    assert not (tmp_path / "out").exists()

    read = run_ranks(_quantize, 3, source, tmp_path / "out", tmp_path / "by three")

    assert contents(tmp_path / "out") == contents(tmp_path / "by three") == expected
    total = Checkpoint.open(source).index.total_bytes
    assert sum(of[0] for of in read) < total == sum(of[1] for of in read)


def test_8_bits_come_back_too(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt2")
    back = surgery.dequantize(save_in_8_bits(source, tmp_path / "packed"), tmp_path / "back")
    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert (after[name].dtype, after[name].shape) == (values.dtype, values.shape)
        assert (after[name].float() - values.float()).abs().max() <= values.float().abs().max() / 127


def test_the_folder_is_uploaded_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with HubServer({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), "--upload", "me/packed"])
    assert result.exit_code == 0, result.output
    assert hub.uploaded == {f"me/packed/{name}": data for name, data in contents(tmp_path / "out").items()}
    assert hub.private == {"me/packed"}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "new"), "--upload", "me/packed"])
    assert (result.exit_code, "--upload: me/packed cannot be made" in result.output) == (2, True), result.output
    assert not (tmp_path / "new").exists()


class Failing(Report):
    """A report of a job that is told too late of what it has read."""

    def count_bytes(self, count: int) -> None:
        super().count_bytes(count)
        if self.bytes_read > 150_000:
            raise OSError("a disk that fails")


def _quantize(source: Path, *outputs: Path) -> list[int]:
    reports = [Report() for _ in outputs]
    for out, report in zip(outputs, reports, strict=True):
        surgery.quantize(source, out, max_shard_bytes=40_000, report=report)
    return [report.bytes_read for report in reports]


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), "--type", "fp4", "--verify"])
    assert result.exit_code == 0, result.output
    assert "README.md" in contents(tmp_path / "out")
    for arguments, message in (
        (["quantize", "source", "out"], "it is there"),
        (["quantize", "source", "source", "--overwrite"], "it is the folder that is read"),
        (["quantize", "out", "new"], "expected weights in 16 or 32 bits, found packed ones"),
        (["dequantize", "source", "new"], "expected weights that are packed in 4 or 8 bits, found none"),
        (["quantize", "source", "new", "--blocksize", "48"], "blocksize must be one of"),
        (["quantize", "source", "new", "--skip-modules", "nothing"], "nothing"),
        (["quantize", "source", "new", "--max-shard-size", "0GB"], "expected a size above 0"),
        (["quantize", "nowhere", "new"], "nowhere"),
    ):
        command, model, out, *rest = arguments
        result = CliRunner().invoke(app, [command, str(tmp_path / model), str(tmp_path / out), *rest])
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    with pytest.raises(ConfigError, match=r"expected a surgery\.Quant, found None"):
        surgery.quantize(source, tmp_path / "new", quant=None)  # type: ignore[arg-type]
