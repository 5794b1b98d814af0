"""`docs/experts.md` is run, block by block, on the tiny model that it makes."""

from __future__ import annotations

import os
import shlex
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import make_checkpoint
from surgery.cli import app
from surgery.finetune.job import run
from surgery.finetune.parser import parse
from tests.docs.test_docs import ROOT, blocks
from tests.helpers.ranks import run_ranks

PAGE = "experts.md"
RANKS = "torchrun --nproc-per-node 2 -m "


def finetune(folder: Path, arguments: list[str]) -> list[float]:
    """The losses that a rank of `surgery finetune` sees."""
    os.chdir(folder)
    return list(run(parse(arguments), console=Console(file=StringIO())).losses.values())


def execute(command: str, folder: Path) -> None:
    name, *arguments = shlex.split(command.removeprefix(RANKS))
    if name == "python":
        assert CliRunner().invoke(make_checkpoint.app, arguments[1:]).exit_code == 0
    elif command.startswith(RANKS):
        first, other = run_ranks(finetune, 2, folder, arguments[1:])
        assert first == other
        assert len(first) == 2
    else:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(24).view(2, 12)).logits.float()
    return found


def stock(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.distributed
def test_every_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks(PAGE):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, PAGE, "exec"), namespace)
        else:
            for line in block.text.splitlines():
                execute(line.removeprefix("$ "), tmp_path)
    for number in ("", "-2"):
        with safe_open(f"build/for-vllm{number}/adapter_model.safetensors", "pt") as served:
            assert "base_model.model.model.layers.1.mlp.experts.7.up_proj.lora_B.weight" in served.keys()  # noqa: SIM118
    adapted = logits(PeftModel.from_pretrained(stock("build/moe"), "build/adapter"))
    apart, merged = ((logits(stock(f"build/{name}")) - adapted).abs().max() for name in ("moe", "merged"))
    assert merged < apart / 4


def test_nothing_on_the_page_is_left_out() -> None:
    found = list(blocks(PAGE))
    assert (ROOT / "docs" / PAGE).read_text().count("```") == 2 * len(found)
    assert {block.language for block in found if block.file is None} == {"python", "console"}
