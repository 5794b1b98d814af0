"""`Checkpoint.open` on local paths; hub ids are in `test_hub.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, WeightsMismatchError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_open_a_folder(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)

    assert checkpoint.source == str(folder)
    assert checkpoint.path == folder
    assert checkpoint.revision is None
    assert checkpoint.config == {"model_type": "llama"}
    assert set(checkpoint.names()) == {"w", "b"}
    assert "w" in checkpoint
    assert "absent" not in checkpoint
    with checkpoint.reader() as reader:
        assert torch.equal(reader.read(checkpoint.entry("w")), torch.ones(3, dtype=torch.bfloat16))


def test_open_a_file_takes_the_config_beside_it(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder / "model.safetensors"))

    assert checkpoint.path == folder
    assert checkpoint.config == {"model_type": "llama"}


def test_a_plain_module_needs_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()

    assert Checkpoint.open(folder).config is None


def test_repr_says_what_it_is(folder: Path) -> None:
    message = repr(Checkpoint.open(folder))

    assert message.startswith(f"<Checkpoint {folder}: 2 tensors in 1 files, ")
    assert message.endswith(("bfloat16, float32>", "float32, bfloat16>"))


def test_a_relative_folder_survives_a_change_of_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    checkpoint = Checkpoint.open(folder.name)
    monkeypatch.chdir("/")

    with checkpoint.reader() as reader:
        assert reader.read("b").tolist() == [1.0, 1.0]
    assert checkpoint.source == folder.name


def test_a_revision_of_a_local_path_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="Revisions are for hub ids"):
        Checkpoint.open(folder, revision="main")


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at") as caught:
        Checkpoint.open(tmp_path / "absent")

    assert caught.value.path == tmp_path / "absent"


def test_an_unknown_tensor_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsMismatchError, match="holds no tensor 'v'"):
        Checkpoint.open(folder).entry("v")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}'])
def test_a_config_that_cannot_be_used(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)

    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        Checkpoint.open(folder)

    assert caught.value.path == folder / "config.json"


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
    ids=["top", "text part"],
)
def test_a_quantized_config_is_refused(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"quantized already.*quantization_config \(gptq\)"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        ("absmax", "expected one layer.weight.quant_state.bitsandbytes__nf4 or fp4, found none"),
        ("quant_state.bitsandbytes__nf4", "layer.weight.absmax, layer.weight.quant_map is missing"),
    ],
)
def test_incomplete_quantized_tensors_are_refused(folder: Path, suffix: str, says: str) -> None:
    save_file({"layer.weight": torch.ones(2), f"layer.weight.{suffix}": torch.ones(2)}, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(folder)


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_quantization_config_means_none(folder: Path, nothing: object) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": nothing, "text_config": None}))

    assert "w" in Checkpoint.open(folder)
