"""`surgery trace` and `surgery finetune --trace`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from surgery.cli import app
from surgery.tracing.folder import read_ranks
from tests.helpers.tiny_tokenizer import save_with_tokenizer
from tests.surgery.tracing.made import Page, trace_of


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments: object) -> str:
    """Text on stderr, on one line, about arguments that must be refused."""
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    return re.sub(r"\s+", " ", result.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(2):
        (tmp_path / f"rank-{rank:05}.json").write_text(trace_of(rank, 2).as_json())
    return tmp_path


def test_draws_what_is_there(folder: Path) -> None:
    result = command("trace", folder)
    assert result.exit_code == 0
    assert result.stdout == f"{folder}/trace.html: 2 of 2 ranks; {folder}/trace.json: their figures\n"
    assert len(Page.read(folder / "trace.html").of("details")) == 2
    (folder / "rank-00001.json").unlink()
    assert f"{folder}/trace.html: 1 of 2 ranks" in command("trace", folder).stdout


def test_draws_elsewhere(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert command("trace", folder, "--output", page).exit_code == 0
    assert json.loads(page.with_suffix(".json").read_text())["world_size"] == 2
    assert page.exists()
    assert not (folder / "trace.html").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [("rank-00000.json", "a page that ends in .html"), ("none/page.html", "none: No such file or directory")],
)
def test_output_that_cannot_be(folder: Path, output: str, says: str) -> None:
    assert says in refused("trace", folder, "--output", folder / output)
    assert len(read_ranks(folder)) == 2


def test_what_is_no_trace_is_named(folder: Path) -> None:
    assert "expected files rank-00000.json" in refused("trace", folder.parent)
    assert "No such file" in refused("trace", folder / "none")
    (folder / "rank-00001.json").write_text("{")
    assert f"error: {folder}/rank-00001.json is not the trace of a rank: Expecting" in refused("trace", folder)


def test_help_says_what_to_do() -> None:
    result = CliRunner().invoke(app, ["trace", "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("DIR", "--output", "surgery finetune ./model", "--data train.jsonl --trace ./trace", "Exit codes"):
        assert text in result.stdout


def test_drawing_needs_no_torch(folder: Path) -> None:
    code = f"import sys; from surgery.cli import app; app(['trace', {str(folder)!r}], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def words(tmp_path: Path, model_type: str, **changes: Any) -> list[object]:
    """A step on a tiny model."""
    model = save_with_tokenizer(tmp_path / "model", model_type, bos=True, max_position_embeddings=128, **changes)
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "the cat sat on the mat"}\n' * 8)
    return [
        "finetune", model, "--data", data, "--output", tmp_path / "adapter", "--trace", tmp_path / "trace",
        "--max-steps", 1, "--max-length", 32, "--lora-r", 4,
    ]  # fmt: skip


def test_finetune(tmp_path: Path) -> None:
    result = command(*words(tmp_path, "llama"))
    assert result.exit_code == 0, result.output
    assert f"Trace: {tmp_path}/trace/trace.html" in result.stdout
    (trace,) = read_ranks(tmp_path / "trace")
    groups = {phase.name: phase.group for phase in trace.phases}
    assert (groups["bind"], groups["train"], groups["save"]) == ("bind", "train", "save")
    assert "train" in trace.predictions
    (memory,) = json.loads((tmp_path / "adapter" / "summary.json").read_text())["memory"]
    assert {phase.name: phase.host_peak for phase in trace.phases} == {
        name: figures["host_peak"] for name, figures in memory.items()
    }
