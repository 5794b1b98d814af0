"""A rank that ends in the middle of a job takes the others down soon, and each of them says which rank it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from surgery.config import FSDP1, FSDP2
from surgery.finetune.options import DataOptions, Job, LoraOptions, TrainingOptions
from tests.distributed.ending import end, end_in_attest
from tests.helpers.models import save_tiny
from tests.helpers.ranks import _free_port, try_ranks
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer

pytestmark = pytest.mark.distributed

SOON = 60

SILENT = "has ended without a word: its own output, or the kernel's log, says why"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("checkpoint"), vocab_size=VOCABULARY, max_position_embeddings=128)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> Job:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": f"the cat sat on mat {number} "}) + "\n" for number in range(20)))
    return Job(
        model=str(checkpoint),
        data=DataOptions(train=data, evaluation_fraction=0.1, max_length=32),
        output=tmp_path / "adapter",
        training=TrainingOptions(max_steps=3, accumulation=4, optimizer="sgd"),
        lora=LoraOptions(r=2, target_modules=("q_proj", "down_proj")),
        attest=True,
    )


@pytest.mark.parametrize(
    ("place", "how", "ending", "world_size", "shard"),
    [
        ("evaluation", "killed", 2, 3, FSDP2()),
        ("training", "killed", 1, 3, FSDP1()),
        ("training", "fails", 1, 2, FSDP2()),
        ("training", "interrupted", 1, 2, FSDP2()),
        ("optimizer", "killed", 0, 2, FSDP2()),
        ("saving", "killed", 1, 3, FSDP2()),
        ("saving", "fails", 1, 2, FSDP1()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, (FSDP1, FSDP2)) else str(value),
)
def test_others_say_which_rank_has_ended(  # noqa: PLR0917  # pytest passes them by name
    job: Job, place: str, how: str, ending: int, world_size: int, shard: FSDP1 | FSDP2
) -> None:
    outcomes = try_ranks(end, world_size, replace(job, shard=shard), place, how, ending, timeout=SOON)
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
    on_rank0, on_rank1 = try_ranks(end_in_attest, 2, checkpoint, timeout=SOON)
    assert f"EndedError: PeerError: rank 1 {SILENT}; rank 1" in str(on_rank0.failure)
    assert "without a result" in str(on_rank1.failure)


def test_from_the_command_line(job: Job, tmp_path: Path) -> None:
    """Rank 1 is killed while it trains; rank 0 exits with 2, and its message is all that there is."""
    command = [
        sys.executable, "-m", "surgery", "finetune", job.model, "--data", str(job.data.train), "--output",
        str(job.output), "--max-steps", "100000", "--metrics", str(tmp_path / "metrics.jsonl"),
    ]  # fmt: skip
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 3 * SOON
        while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < deadline
            assert ranks[0].poll() is None
            time.sleep(0.2)
        ranks[1].send_signal(signal.SIGKILL)
        _, said = ranks[0].communicate(timeout=SOON)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 2
    assert f"error: rank 1 {SILENT}" in said
    assert "Traceback" not in said
    assert not (job.output / "adapter_model.safetensors").exists()
