"""Configurations that the headers contradict: how little of the model is built before that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from typer.testing import CliRunner

from surgery.checkpoint import Checkpoint
from surgery.cli import app
from surgery.errors import WeightsMismatchError
from surgery.model.skeleton import build_on_meta, causal_lm
from tests.helpers.damage import CONTRADICTIONS, edit_config
from tests.helpers.models import save_tiny


def built_of(folder: Path) -> int:
    """How many parameters were made before the headers were found to contradict config.json."""
    made = []
    hook = register_module_parameter_registration_hook(lambda module, name, value: made.append(name))
    try:
        with pytest.raises(WeightsMismatchError, match="are not of the same model"):
            skeleton(folder)
    finally:
        hook.remove()
    return len(made)


def skeleton(folder: Path) -> nn.Module:
    build = causal_lm(Checkpoint.open(folder), torch.bfloat16)
    return build_on_meta(build, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.parametrize("changes", [changes for changes, _ in CONTRADICTIONS], ids=str)
def test_little_or_nothing_is_built(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    assert built_of(tmp_path / "model") < 1000
    planned = CliRunner().invoke(app, ["plan", str(tmp_path / "model")])
    assert planned.exit_code == 2
    assert "are not of the same model" in planned.stderr


@pytest.mark.parametrize("name", ["depth", "num_layers"])
def test_a_model_is_stopped_whatever_its_config_calls_its_layers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The names in a config are a first look; what is counted while building holds without them."""
    from surgery.checkpoint import refusals as module

    shutil.copytree(tiny, tmp_path / "model")
    edit_config(tmp_path / "model", num_hidden_layers=5000, **{name: 3})
    monkeypatch.setattr(module, "_require_agreement", lambda *arguments, **options: None)
    assert built_of(tmp_path / "model") < 1000


FAMILIES: tuple[tuple[str, Callable[[Path], Path]], ...] = (
    ("tied", lambda folder: save_tiny(folder, tie_word_embeddings=True)),
    ("experts", lambda folder: save_tiny(folder, "mixtral", num_local_experts=4)),
    ("transposed", lambda folder: save_tiny(folder, "gpt2", n_layer=30, n_head=4, n_embd=16)),
)


@pytest.mark.parametrize("make", [make for _, make in FAMILIES], ids=[name for name, _ in FAMILIES])
def test_what_the_headers_can_fill_is_built(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    assert sum(parameter.numel() for parameter in skeleton(folder).parameters()) > 0
    assert json.loads((folder / "config.json").read_text())["model_type"]
