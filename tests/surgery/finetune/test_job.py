"""Whole jobs on a tiny checkpoint: one process, several ranks, torchrun, and jobs that do not get to their end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

import patches
from surgery.config import FSDP1, FSDP2
from surgery.errors import ConfigError
from surgery.finetune.job import run
from surgery.finetune.loop import TrainingError
from surgery.finetune.options import DataOptions, Job, LoraOptions, TrainingOptions
from surgery.finetune.summary import Summary
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks, try_ranks
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer

# peft 0.21 asks a model of transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

STEPS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("checkpoint"), vocab_size=VOCABULARY, max_position_embeddings=128)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> Job:
    """SGD in float32, as comparisons between world sizes need it; a global batch of 4."""
    data = tmp_path / "train.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": f"what does cat {index} say? ", "completion": "the cat sat on the mat " * (1 + index % 3)}
        for index in range(20)
    ]
    turns = [{"role": "user", "content": "the dog?"}, {"role": "assistant", "content": "ate the cake"}]
    lines.append({"messages": turns})
    data.write_text("\n".join(map(json.dumps, lines)))
    return Job(
        model=str(checkpoint),
        data=DataOptions(train=data, evaluation_fraction=0.1, max_length=64),
        output=tmp_path / "adapter",
        metrics=tmp_path / "metrics.jsonl",
        precision="fp32",
        training=TrainingOptions(max_steps=STEPS, batch_size=4, optimizer="sgd", lr=1.0, clip=None, evaluate_every=4),
        lora=LoraOptions(r=4, alpha=8, init="gaussian"),
    )


def quiet() -> Console:
    return Console(file=StringIO())


def metrics_of(job: Job) -> list[dict[str, Any]]:
    assert job.metrics is not None
    return [json.loads(line) for line in job.metrics.read_text().splitlines()]


def test_one_process(job: Job) -> None:
    with job.data.train.open("a") as data:
        data.write("\n" + json.dumps({"text": "longer than all others " * 20}))
    out = StringIO()
    summary = run(job, console=Console(file=out))
    assert patches.active() == []

    first, *_, last = summary.training.evaluations
    assert [evaluation.step for evaluation in summary.training.evaluations] == [0, 4, STEPS]
    assert last.loss < first.loss
    lines = metrics_of(job)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == list(summary.training.losses)

    adapter = load_file(job.output / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7
    assert all(tensor.any() for tensor in adapter.values())

    card = (job.output / "README.md").read_text()
    for row in (
        f"name | {job.model}",
        "training.optimizer | sgd",
        "training samples | 20",
        "file | train.jsonl",
        f"first step | {summary.training.losses[0]}",
        f"last step | {summary.training.losses[-1]}",
        f"{last.loss:.4f} after step {STEPS}",
        f"torch | {torch.__version__}",
        "quant.quant_type | nf4",
    ):
        assert row in card
    assert re.search(r"SHA-256 of all tokens \| [0-9a-f]{64} ", card)
    AutoTokenizer.from_pretrained(job.output)

    written = json.loads((job.output / "summary.json").read_text())
    assert written["evaluations"] == [vars(evaluation) for evaluation in summary.training.evaluations]
    assert written["config"]["training"]["optimizer"] == "sgd"
    assert (written["sharding"], written["placement"]) == (None, "replicated")
    assert written["samples"] == {"train": 20, "evaluation": 2, "cut": 1, "dropped": 0}
    assert {"skeleton", "train", "save"} <= written["memory"][0].keys()
    assert written["read_once_per_node"] == {}
    assert written["versions"]["torch"] == torch.__version__
    assert written["patches_left"] == []
    states = {row["id"]: row["state"] for row in written["patches"]}
    assert states["bitsandbytes.linear4bit-shape"] == "reverted"
    for text in (
        "20 samples to train on, 2 to evaluate on",
        "1 samples are cut off: they are longer than 64 tokens",
        f"step {STEPS}/{STEPS}",
        "Patches still active: none",
    ):
        assert text in out.getvalue()


def run_on_ranks(job: Job) -> Summary:
    summary = run(job, console=quiet())
    assert patches.active() == []
    return summary


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shard", "training", "placement"),
    [
        (FSDP1(), {"batch_size": 1, "accumulation": 2}, "rank0-cpu"),
        (
            FSDP1(strategy="shard-grad-op", use_orig_params=True),
            {"activation_checkpointing": "non-reentrant"},
            "rank0-cpu",
        ),
        (FSDP1(), {"activation_checkpointing": "reentrant"}, "rank0-cpu"),
        (FSDP2(), {"batch_size": 1, "accumulation": 2}, "sharded"),
        (FSDP2(reshard_after_forward=False), {"activation_checkpointing": "non-reentrant"}, "sharded"),
        (FSDP2(cpu_offload=True), {"activation_checkpointing": "reentrant", "activation_offload": True}, "sharded"),
        (FSDP2(mesh=(2, 1)), {}, "replicated"),
    ],
)
def test_ranks_train_as_one_process(job: Job, *, shard: FSDP1 | FSDP2, training: Any, placement: Any) -> None:
    """The same global batch, divided among ranks and micro-batches."""
    clipped = replace(job.training, clip=1.0)
    expected = run(replace(job, training=clipped), console=quiet())
    alone = load_file(job.output / "adapter_model.safetensors")
    sharded = replace(
        job,
        output=job.output.with_name("sharded"),
        shard=shard,
        placement=placement if placement == "replicated" else None,
        training=replace(clipped, **{"batch_size": 2, **training}),
    )
    for summary in run_ranks(run_on_ranks, 2, sharded):
        assert summary.training.losses == pytest.approx(expected.training.losses, rel=1e-5)
        for found, wanted in zip(summary.training.evaluations, expected.training.evaluations, strict=True):
            assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert len(summary.memory) == 2
        assert summary.patches_left == ()
        assert (summary.sharding, summary.placement) == (type(shard).__name__, placement)
    together = load_file(sharded.output / "adapter_model.safetensors")
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("shard", [FSDP1(use_orig_params=True), FSDP2()], ids=["fsdp1", "fsdp2"])
def test_dora_from_whole_weights(job: Job, shard: FSDP1 | FSDP2) -> None:
    dora = replace(job, lora=replace(job.lora, dora=True))
    expected = run(dora, console=quiet())
    sharded = replace(
        dora,
        output=job.output.with_name("sharded"),
        shard=shard,
        placement="replicated",
        training=replace(job.training, batch_size=2),
    )
    for summary in run_ranks(run_on_ranks, 2, sharded):
        assert summary.training.losses == pytest.approx(expected.training.losses, rel=1e-5)
    assert len(load_file(sharded.output / "adapter_model.safetensors")) == 3 * 2 * 7


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast", "fp16-autocast"])
@pytest.mark.parametrize("shard", [FSDP1(), FSDP2()], ids=["fsdp1", "fsdp2"])
def test_precision_policies_train(job: Job, shard: FSDP1 | FSDP2, precision: Any) -> None:
    """To about the losses of one process in float32; fp16 may skip the first step, until the scale fits."""
    wanted = [evaluation.loss for evaluation in run(job, console=quiet()).training.evaluations]
    training = replace(job.training, batch_size=2)
    sharded = replace(job, output=job.output.with_name("sharded"), shard=shard, precision=precision, training=training)
    on_rank0, on_rank1 = run_ranks(run_on_ranks, 2, sharded)
    assert on_rank0.training == replace(on_rank1.training, seconds=on_rank0.training.seconds)
    found = [evaluation.loss for evaluation in on_rank0.training.evaluations]
    assert found == pytest.approx(wanted, rel=0.05)
    assert found[0] == pytest.approx(wanted[0], rel=0.005)
    assert found[-1] < found[0]


class Interrupting(Console):
    """A console on which somebody presses Ctrl-C when the second step is shown."""

    def print(self, *objects: Any, **options: Any) -> None:
        if str(objects[0]).startswith("step 2/"):
            raise KeyboardInterrupt
        super().print(*objects, **options)


def test_interrupt_undoes_every_patch_and_saves_nothing(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, console=Interrupting(file=StringIO()))
    assert patches.active() == []
    assert not (job.output / "adapter_config.json").exists()
    assert not (job.output / "summary.json").exists()
    assert len(metrics_of(job)) == 2


def test_training_that_diverges_is_stopped(job: Job) -> None:
    training = replace(job.training, lr=1e30)
    with pytest.raises(TrainingError, match=r"the loss of step \d is (nan|inf)"):
        run(replace(job, training=training), console=quiet())
    assert patches.active() == []


def test_adapter_is_not_overwritten_unasked(job: Job) -> None:
    run(job, console=quiet())
    with pytest.raises(ConfigError, match=r"already has an adapter .adapter_config.json"):
        run(job, console=quiet())
    again = run(replace(job, overwrite=True), console=quiet())
    assert len(again.training.losses) == STEPS


@pytest.mark.parametrize("shard", [FSDP1(use_orig_params=True), FSDP2(reshard_after_forward=False)])
def test_sharding_options_in_one_process_are_refused(job: Job, shard: FSDP1 | FSDP2) -> None:
    with pytest.raises(ConfigError, match=f"more than one rank for {type(shard).__name__}"):
        run(replace(job, shard=shard), console=quiet())


def run_refused(job: Job) -> str:
    with pytest.raises(ConfigError) as caught:
        run(job, console=quiet())
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shard", "placement", "says"),
    [
        (FSDP1(), "replicated", "the base weight is already freed: add --use-orig-params"),
        (FSDP1(use_orig_params=True), None, "add --no-low-memory"),
        (FSDP2(), None, "add --no-low-memory"),
    ],
)
def test_dora_without_whole_weights_is_refused(job: Job, shard: FSDP1 | FSDP2, placement: Any, says: str) -> None:
    dora = replace(job, lora=replace(job.lora, dora=True), shard=shard, placement=placement)
    for message in run_ranks(run_refused, 2, dora):
        assert says in message


def run_with_bad_data_on_one_rank(job: Job) -> str:
    if dist.get_rank() == 1:
        bad = job.output.with_name("bad.jsonl")
        bad.write_text("{}\n")
        job = replace(job, data=replace(job.data, train=bad))
    run(job, console=quiet())
    return "trained"


@pytest.mark.distributed
def test_failing_rank_takes_the_others_down_with_its_message(job: Job) -> None:
    outcomes = try_ranks(run_with_bad_data_on_one_rank, 2, job)
    assert [outcome.result for outcome in outcomes] == [None, None]
    for outcome, kind in zip(outcomes, ("PeerError: rank 1 failed: DataError", "DataError"), strict=True):
        assert outcome.failure is not None
        assert kind in outcome.failure
        assert "bad.jsonl:1: expected the keys" in outcome.failure


def run_with_other_data_on_one_rank(job: Job) -> bool:
    if dist.get_rank() == 1:
        other = job.output.with_name("other.jsonl")
        other.write_text('{"text": "the cat"}\n' * 21)
        job = replace(job, data=replace(job.data, train=other))
    says = r"the ranks differ in data(?s:.*)digest of all tokens is \w+ on rank 0, \w+ on rank 1"
    with pytest.raises(ConfigError, match=says):
        run(job, console=quiet())
    return True


@pytest.mark.distributed
def test_ranks_with_other_data_refuse(job: Job) -> None:
    assert run_ranks(run_with_other_data_on_one_rank, 2, job) == [True, True]


def torchrun(job: Job, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [job.model, "--data", job.data.train, "--output", job.output, "--max-steps", "2", *options]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "surgery",
         "finetune", *map(str, arguments)],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun(job: Job) -> None:
    result = torchrun(job, "--eval-fraction", "0.1")
    assert result.returncode == 0, result.stderr
    assert "Patches still active: none" in result.stdout
    assert result.stdout.count("evaluation loss, base model") == 1
    assert (job.output / "adapter_model.safetensors").exists()
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["world_size"], len(summary["memory"]), len(summary["losses"])) == (2, 2, 2)
    assert (summary["sharding"], summary["placement"]) == ("FSDP2", "sharded")
    assert "/torch/" not in result.stderr, "a warning that torch has for each rank"


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_of_a_job_that_is_refused(job: Job) -> None:
    job.data.train.write_text("not JSON\n")
    result = torchrun(job)
    assert result.returncode != 0
    assert "train.jsonl:1: not JSON" in result.stderr
    assert "exitcode: 2" in result.stderr or "exitcode  : 2" in result.stderr
    assert "surgery/cli.py" not in result.stderr, "a traceback of ours: torchrun's own is all that there should be"
