"""What the recipe refuses, through the command line: a message on stderr, exit code 2, and no weight read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import patches
from surgery.cli import app
from tests.helpers.damage import DAMAGES, Damage


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "the cat", "completion": " sat on the mat"}\n' * 4)
    return path


def finetune(model: Path, data: Path, *options: str) -> tuple[int, str]:
    """Exit code, and stderr on one line."""
    arguments = ["finetune", str(model), "--data", str(data), "--output", str(data.parent / "out"), *options]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, re.sub(r"\s+", " ", result.stderr)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damaged_checkpoint(tmp_path: Path, tiny: Path, data: Path, reads: list[str], damage: Damage) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage.apply(folder)
    code, message = finetune(folder, data)
    assert code == 2
    assert message.startswith("error: ")
    for text in damage.says:
        assert text in message
    assert reads == []
    assert patches.active() == []
    assert not (folder / "executed").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.distributed
def test_torchrun_ends_with_the_message_and_the_exit_code(tiny: Path, data: Path) -> None:
    """The launcher's own exit code is 1 whatever happened; its report has the ranks'."""
    options = ["--mesh", "2x2", "--output", str(data.parent / "out")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "surgery", "finetune", str(tiny), "--data", str(data), *options),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "error: expected --mesh of 2 ranks in all, found 2x2" in done.stderr
    assert re.search(r"exitcode\s*:\s*2\b", done.stderr)
    assert not (data.parent / "out" / "adapter_model.safetensors").exists()
