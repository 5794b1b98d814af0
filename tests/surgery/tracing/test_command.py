"""`surgery trace` and `surgery finetune --trace`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from surgery.cli import app
from surgery.config import FSDP2
from surgery.finetune.job import run
from surgery.finetune.options import DataOptions, Job, LoraOptions, TrainingOptions
from surgery.tracing.folder import read_ranks
from tests.helpers.damage import edit_tensors
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer
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
    for text in ("DIR", "--output", "surgery finetune ./model --data train.jsonl --trace ./trace", "Exit codes"):
        assert text in result.stdout


def test_drawing_needs_no_torch(folder: Path) -> None:
    code = f"import sys; from surgery.cli import app; app(['trace', {str(folder)!r}], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def job_of(tmp_path: Path, model_type: str, **changes: Any) -> Job:
    """Two steps on a tiny model."""
    model = save_tiny(tmp_path / "model", model_type, vocab_size=VOCABULARY, max_position_embeddings=128, **changes)
    tiny_tokenizer(bos=True).save_pretrained(model)
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "the cat", "completion": " sat on the mat"}\n' * 8)
    return Job(
        model=str(model),
        data=DataOptions(train=data, max_length=32),
        output=tmp_path / "adapter",
        trace=tmp_path / "trace",
        training=TrainingOptions(max_steps=2),
        lora=LoraOptions(r=4, alpha=8),
        precision="fp32",
    )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_of(tmp_path, "llama")


def test_finetune(job: Job) -> None:
    result = command(
        "finetune", job.model, "--data", job.data.train, "--output", job.output, "--trace", job.trace,
        "--max-steps", 2, "--max-length", 32, "--lora-r", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"Trace: {job.trace}/trace.html" in result.stdout
    assert job.trace is not None
    (trace,) = read_ranks(job.trace)
    groups = {phase.name: phase.group for phase in trace.phases}
    assert (groups["skeleton"], groups["train"], groups["save"]) == ("load", "train", "save")
    (memory,) = json.loads((job.output / "summary.json").read_text())["memory"]
    assert {phase.name: phase.host_peak for phase in trace.phases} == {
        name: figures["host_peak"] for name, figures in memory.items()
    }


def test_finetune_names_what_is_ignored_or_read_once_per_node(tmp_path: Path) -> None:
    job = job_of(tmp_path, "gpt2", n_embd=64, n_layer=2, n_head=4)
    masks = {f"transformer.h.{number}.attn.bias": torch.ones(1, 1, 4, 4) for number in range(2)}
    edit_tensors(Path(job.model), lambda tensors: tensors.update(masks))
    result = command(
        "finetune", job.model, "--data", job.data.train, "--output", job.output, "--trace", job.trace,
        "--max-steps", 1, "--max-length", 32, "--lora-r", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    line = "read once per node, by one rank for the others: transformer.h.*.attn.c_attn.weight (2), "
    assert result.stderr.count(line) == 1
    assert job.trace is not None
    assert line in (job.trace / "trace.html").read_text()
    (trace,) = read_ranks(job.trace)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["read_once_per_node"] == trace.read_once_per_node
    assert sum(trace.read_once_per_node.values()) == 8
    assert "2 names in the checkpoint with no place in this model, ignored as transformers does" in result.stderr
    assert summary["ignored"] == {"transformer.h.*.attn.bias": 2}
    assert summary["initialized"] == {}


def test_finetune_refuses_a_folder_that_cannot_be_made(job: Job, reads: list[str]) -> None:
    message = refused("finetune", job.model, "--data", job.data.train, "--trace", job.data.train)
    assert f"the trace cannot be written to {job.data.train}: File exists" in message
    assert reads == []


def finetune(job: Job) -> list[set[str]]:
    """The phases of every rank, as the summary has them."""
    summary = run(job, console=Console(file=StringIO()))
    return [set(phases) for phases in summary.memory]


@pytest.mark.distributed
def test_finetune_on_two_ranks(job: Job) -> None:
    assert job.shard == FSDP2()
    expected, same = run_ranks(finetune, 2, job)
    assert job.trace is not None
    traces = read_ranks(job.trace)
    assert [{phase.name for phase in trace.phases} for trace in traces] == expected == same
    assert [trace.error for trace in traces] == [None, None]
    page = Page.read(job.trace / "trace.html")
    assert [{row[0] for row in table} for table in page.rows("of-phases")] == expected
