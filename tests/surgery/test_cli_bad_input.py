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
from tests.helpers.ranks import run_ranks

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


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


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK to be a number, found None"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE to be a number, found 'two'"),
        (LAUNCHED, "MASTER_ADDR"),
        ({**LAUNCHED, "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        ({**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "'x'"),
        ({**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "1/2 clients joined"),
    ],
)
def test_ranks_that_no_launcher_has_started(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, data: Path, environment: dict[str, str], says: str
) -> None:
    for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, message = finetune(tiny, data, "--timeout", "0.02")
    assert code == 2
    assert says in message
    assert "torchrun" in message


REFUSED_ON_TWO_RANKS = {
    "uint8": (["--fsdp", "1", "--quant-storage", "uint8"], "quant_storage=torch.uint8 cannot be sharded by FSDP1"),
    "mesh": (["--mesh", "2x2"], "mesh=(2, 2) needs 4 ranks"),
    "mesh-of-fsdp1": (["--fsdp", "1", "--mesh", "2x2"], "mesh=(2, 2) needs 4 ranks"),
    "mesh-of-one": (["--fsdp", "1", "--sharding", "hybrid-shard", "--mesh", "2x1"], "shard dimension of 1"),
    "offload": (["--fsdp", "1", "--cpu-offload"], "here there is only a CPU"),
    "dora": (["--dora"], "--no-low-memory"),
    "dora-of-fsdp1": (["--fsdp", "1", "--dora"], "--use-orig-params"),
    "dora-on-meta": (["--fsdp", "1", "--dora", "--use-orig-params"], "--no-low-memory"),
    "pissa": (["--lora-init", "pissa"], "init_lora_weights='pissa'"),
    "olora": (["--lora-init", "olora"], "init_lora_weights='olora'"),
    "targets": (["--target-modules", "nowhere"], "'nowhere' matches no module"),
}


def refused_on_this_rank(model: Path, data: Path) -> dict[str, tuple[int, str]]:
    return {name: finetune(model, data, *options) for name, (options, _) in REFUSED_ON_TWO_RANKS.items()}


@pytest.mark.distributed
def test_options_that_two_ranks_cannot_work_with(tiny: Path, data: Path) -> None:
    for rank, said in enumerate(run_ranks(refused_on_this_rank, 2, tiny, data)):
        assert said.keys() == REFUSED_ON_TWO_RANKS.keys()
        for name, (code, message) in said.items():
            assert code == 2, f"{name}: {message}"
            assert message.startswith("error: " if rank == 0 else "rank 1: error: ")
            assert REFUSED_ON_TWO_RANKS[name][1] in message


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
    assert "error: mesh=(2, 2) needs 4 ranks (replicate x shard), but there are 2" in done.stderr
    assert re.search(r"exitcode\s*:\s*2\b", done.stderr)
    assert not (data.parent / "out" / "adapter_model.safetensors").exists()
