"""A rank that ends in the middle of a job takes the others down soon, and each of them says which rank it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ending import end, end_in_attest
from tests.helpers.ranks import _free_port, try_ranks
from tests.helpers.tiny_tokenizer import save_with_tokenizer

pytestmark = pytest.mark.distributed

SILENT = "has ended without a word: its own output, or the kernel's log, says why"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("checkpoint"), bos=True, max_position_embeddings=128)


@pytest.fixture
def told(checkpoint: Path, tmp_path: Path) -> list[str]:
    """The words of a job."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": f"the cat sat on mat {number} "}) + "\n" for number in range(20)))
    options = ["--eval-fraction", "0.1", "--max-length", "32", "--gradient-accumulation-steps", "4", "--lora-r", "2"]
    options += ["--max-steps", "3", "--save-strategy", "no", "--attest", "--plan", "off"]
    return [str(checkpoint), "--data", str(data), "--output", str(tmp_path / "adapter"), *options]


@pytest.mark.parametrize(
    ("place", "how", "ending", "world_size"),
    [
        ("evaluation", "killed", 2, 3),
        ("training", "fails", 1, 2),
        ("training", "interrupted", 1, 2),
        ("optimizer", "killed", 0, 2),
        ("saving", "killed", 1, 2),
    ],
)
def test_others_say_which_rank_has_ended(told: list[str], place: str, how: str, ending: int, world_size: int) -> None:
    outcomes = try_ranks(end, world_size, told, place, how, ending)
    says = {
        "killed": f"rank {ending} {SILENT}",
        "fails": f"rank {ending} failed: MemoryError: no memory left",
        "interrupted": f"rank {ending} failed: KeyboardInterrupt: ",
    }[how]
    for rank, outcome in enumerate(outcomes):
        if rank != ending:
            assert f"EndedError: PeerError: {says}; rank {ending}; active []" in str(outcome.failure)
    own = {"killed": "without a result", "fails": "MemoryError: no memory left", "interrupted": "KeyboardInterrupt: "}
    assert own[how] in str(outcomes[ending].failure)


def test_without_a_job_too(checkpoint: Path) -> None:
    """A model of `surgery.qlora` in a loop of one's own."""
    on_rank0, on_rank1 = try_ranks(end_in_attest, 2, checkpoint)
    assert f"EndedError: PeerError: rank 1 {SILENT}; rank 1" in str(on_rank0.failure)
    assert "without a result" in str(on_rank1.failure)


def test_from_the_command_line(told: list[str], tmp_path: Path) -> None:
    """Rank 1 is killed while it trains; rank 0 exits with 2, and its message is all that there is."""
    command = [sys.executable, "-m", "surgery", "finetune", *told, "--max-steps", "100000"]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].stdout is not None
        assert any(line.startswith("step 1/") for line in ranks[0].stdout)
        ranks[1].send_signal(signal.SIGKILL)
        _, said = ranks[0].communicate(timeout=240)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 2
    assert f"error: rank 1 {SILENT}" in said
    assert "Traceback" not in said
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
