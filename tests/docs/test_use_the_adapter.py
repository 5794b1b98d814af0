"""`docs/use-the-adapter.md` is run, block by block, on a tiny model and an adapter of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from tests.docs.test_docs import BLOCK, ROOT
from tests.helpers.tiny_tokenizer import save_with_tokenizer

PAGE = (ROOT / "docs" / "use-the-adapter.md").read_text()


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The logits that were trained; the working folder has `./model` and `./adapter`."""
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    save_with_tokenizer(tmp_path / "model", initializer_range=0.2, **shape)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with surgery.qlora("./model", lora=lora, report=surgery.Report()) as model:
        surgery.save_adapter(model, "./adapter")
        return logits(model.eval())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(24).view(2, 12)).logits.float()
    return found


def test_every_block_runs_in_order(trained: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    ran = []
    for block in BLOCK.finditer(PAGE):
        if PAGE[: block.start()].rstrip().rpartition("\n")[2].startswith("<!-- not run in CI"):
            continue
        ran.append(block["language"])
        if block["language"] == "python":
            exec(compile(block["text"], "use.py", "exec"), namespace)
            continue
        for line in block["text"].splitlines():
            result = CliRunner().invoke(app, shlex.split(line.removeprefix("$ surgery ")))
            assert result.exit_code == 0, result.output
    assert (ran.count("python"), ran.count("console")) == (5, 5)
    assert capsys.readouterr().out.strip()
    in_16_bits, in_4_bits = (
        (logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)) - trained).abs().mean()
        for folder in ("./merged", "./merged-4-bits")
    )
    assert in_4_bits < in_16_bits / 4, "the second merge is of what was trained"


def test_only_what_is_marked_is_not_run() -> None:
    assert PAGE.count("```") == 2 * len(list(BLOCK.finditer(PAGE)))
    assert {block["language"] for block in BLOCK.finditer(PAGE)} == {"console", "python", "sh"}
    assert len(re.findall(r"<!-- not run in CI: .+ -->\n```sh", PAGE)) == PAGE.count("```sh") == 1
