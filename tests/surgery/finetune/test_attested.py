"""`surgery finetune --attest`: what a clean job shows, and that a job whose weights change stops and says where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

import patches
from surgery.attestation.differences import AttestationError
from surgery.cli import app
from surgery.config import FSDP1, FSDP2
from surgery.finetune.job import run
from surgery.finetune.options import DataOptions, Job, LoraOptions, TrainingOptions
from surgery.finetune.summary import Check, Summary
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LAYERS = 14


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Job:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": "the cat sat on the mat"}) + "\n" for _ in range(20)))
    return Job(
        model=str(tiny),
        data=DataOptions(train=data, evaluation_fraction=0.2, max_length=32),
        output=tmp_path / "adapter",
        training=TrainingOptions(max_steps=3, batch_size=2, evaluate_every=2),
        lora=LoraOptions(r=4, alpha=8),
        attest=True,
    )


def attested(job: Job) -> Summary:
    return run(job, console=Console(file=StringIO()))


def whens(checks: tuple[Check, ...]) -> list[tuple[str, str, int]]:
    return [(check.when, check.where, check.layers) for check in checks]


STAGES = [
    ("start", "at rest", LAYERS),
    ("step 0", "in forward", 8),
    ("step 2", "in forward", 8),
    ("step 3", "in forward", 8),
    ("end", "at rest", LAYERS),
    ("saved", "at rest", LAYERS),
]


def test_a_job_says_what_it_has_shown(job: Job) -> None:
    out = StringIO()
    summary = run(job, console=Console(file=out))
    assert summary.attestation is not None
    assert whens(summary.attestation.checks) == STAGES
    assert f"Attestation: {LAYERS} layers are what was quantized, at rest (start, end, saved) and in forward (3" in (
        out.getvalue()
    )
    written = json.loads((job.output / "summary.json").read_text())
    assert written["attestation"]["digest"] == summary.attestation.digest
    assert [check["when"] for check in written["attestation"]["checks"]] == [when for when, *_ in STAGES]
    assert written["config"]["attest"] is True
    assert {"attest-start", "attest-end", "attest-saved"} <= written["memory"][0].keys()


def test_without_an_evaluation_the_first_step_is_watched(job: Job) -> None:
    data = replace(job.data, evaluation_fraction=None)
    summary = attested(replace(job, data=data, training=replace(job.training, evaluate_every=None)))
    assert summary.attestation is not None
    assert [when for when, *_ in whens(summary.attestation.checks)] == ["start", "step 1", "end", "saved"]
    assert len(summary.training.losses) == 3


def test_a_job_that_is_not_asked_to_shows_nothing(job: Job) -> None:
    summary = attested(replace(job, attest=False))
    assert summary.attestation is None
    assert "Attestation" not in summary.text()


@contextmanager
def changing_bits(on_rank: int, *, once_trained: bool) -> Iterator[None]:
    """In every evaluation, or in those after training has begun, flip a bit of what 4-bit layers use on one rank."""
    is_on = not once_trained

    def flip(module: nn.Module, _inputs: object) -> None:
        nonlocal is_on
        is_on |= torch.is_grad_enabled()
        is_here = (dist.get_rank() if dist.is_initialized() else 0) == on_rank
        if is_on and is_here and isinstance(module, Linear4bit) and not torch.is_grad_enabled():
            module.weight.detach().view(-1).view(torch.uint8)[3] ^= 2

    hook = register_module_forward_pre_hook(flip)
    try:
        yield
    finally:
        hook.remove()


def attested_on_ranks(job: Job, shards: list[FSDP1 | FSDP2]) -> list[Summary]:
    return [attested(replace(job, shard=shard, output=job.output / str(i))) for i, shard in enumerate(shards)]


@pytest.mark.distributed
def test_the_digest_is_the_same_on_one_rank_and_on_two(job: Job) -> None:
    alone = attested(job).attestation
    assert alone is not None
    for summaries in run_ranks(attested_on_ranks, 2, replace(job, output=job.output / "two"), [FSDP1(), FSDP2()]):
        for summary in summaries:
            assert summary.attestation is not None
            assert whens(summary.attestation.checks) == STAGES
            assert summary.attestation.digest == alone.digest


def stopped(job: Job) -> tuple[str, list[str], bool]:
    """What stops a job in whose second evaluation weights change on rank 1."""
    with changing_bits(1, once_trained=True), pytest.raises(AttestationError) as caught:
        attested(job)
    return str(caught.value), [str(patch) for patch in patches.active()], (job.output / "adapter_config.json").exists()


@pytest.mark.distributed
def test_weights_that_change_in_forward_stop_all_ranks(job: Job) -> None:
    for message, active, is_saved in run_ranks(stopped, 2, replace(job, shard=FSDP2())):
        assert "8 of 8 attested layers are not what was quantized" in message
        assert "in forward, rank 1: 1 of " in message
        assert "rank 0" not in message
        assert (active, is_saved) == ([], False)


def test_the_command_exits_with_code_2(job: Job) -> None:
    options: list[Any] = ["finetune", job.model, "--data", job.data.train, "--output", job.output, "--max-steps", 1]
    options += ["--eval-fraction", 0.2]
    with changing_bits(0, once_trained=False):
        result = CliRunner().invoke(app, [*map(str, options), "--attest"])
    assert result.exit_code == 2, result.output
    assert "of 8 attested layers are not what was quantized" in result.stderr
    assert ", in forward, rank 0: 1 of " in result.stderr
    assert not (job.output / "adapter_config.json").exists()
