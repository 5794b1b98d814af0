"""Code that a checkpoint brings along: never run, and nobody is asked whether to run it."""

from __future__ import annotations

import ast
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.damage import REMOTE_CODE
from tests.helpers.tiny_tokenizer import save_with_tokenizer

ROOT = Path(__file__).parents[1]


def bring_code(folder: Path) -> None:
    """Give the tokenizer in `folder` a class of its own, whose file leaves a trace when it runs."""
    (folder / "tokenization_other.py").write_text(
        REMOTE_CODE + "from transformers import PreTrainedTokenizerFast\nclass Other(PreTrainedTokenizerFast): pass\n"
    )
    file = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_other.Other", "tokenization_other.Other"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Other", "auto_map": auto_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_with_tokenizer(tmp_path / "model")


def run_where_somebody_types_y(*command: object, home: Path) -> tuple[int, str]:
    """Exit code and output of a command at a terminal where every question is answered with yes."""
    person, terminal = pty.openpty()
    os.write(person, b"y\n" * 50)
    try:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        )
    finally:
        os.close(person)
        os.close(terminal)
    return done.returncode, done.stdout


def traces(folder: Path) -> list[Path]:
    """What the code has left behind: transformers copies it to a cache before it imports it."""
    return [*folder.rglob("executed")]


def test_a_tokenizer_of_the_checkpoint_is_not_run_though_somebody_types_y(folder: Path, tmp_path: Path) -> None:
    bring_code(folder)
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "the cat sat"}\n' * 4)
    options = ("--data", data, "--output", tmp_path / "out", "--max-steps", 1)
    code, said = run_where_somebody_types_y("-m", "surgery", "finetune", folder, *options, home=tmp_path / "home")
    assert traces(tmp_path) == []
    assert code == 2, said
    assert "is code that the checkpoint brings along, which is not run" in " ".join(said.split())
    assert "[y/N]" not in said


def calls_of_loaders(file: Path) -> Iterator[ast.Call]:
    """Calls such as `AutoTokenizer.from_pretrained(...)`: of the classes that look for code in a checkpoint."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value).rpartition(".")[2]
        if node.func.attr in ("from_pretrained", "from_config") and owner.startswith("Auto"):
            yield node


def test_every_loader_says_that_no_code_is_to_be_run() -> None:
    files = [file for package in ("surgery", "patches", "tools") for file in (ROOT / package).rglob("*.py")]
    calls = [(file, call) for file in files for call in calls_of_loaders(file)]
    assert len(calls) >= 8
    for file, call in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", f"{file}:{call.lineno}"
