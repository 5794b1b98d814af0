"""A Llama-shaped model with random weights, loaded under each placement, then trained for a few steps."""

from __future__ import annotations

import gc
import math
import os
import time
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

import surgery
from checkpoints.folder import build, is_complete
from checkpoints.llama import SHAPES
from checkpoints.synthetic import SyntheticCheckpoint
from gpu_checks.findings import Findings, attempt
from gpu_checks.job import Job, Ranks
from surgery.config import Placement

__all__ = ["check_training", "make_checkpoint"]

STEPS = 5
LORA_RANK = 16
LEARNING_RATE = 1e-3

#: Length of a sequence; a batch is one sequence per rank.
TOKENS, FEW_TOKENS = 1024, 64


def check_training(job: Job, ranks: Ranks, findings: Findings) -> None:
    """Make the checkpoint on rank 0, then load and train from it on all ranks, under each placement."""
    made = ranks.gather(attempt(partial(make_checkpoint, job)))
    findings.add("training", "checkpoint", made)
    if made[0]["error"]:
        return
    for placement in get_args(Placement):
        outcome = attempt(partial(_load_and_train, job, made[0]["folder"], placement))
        findings.add("training", placement, ranks.gather(outcome))


def make_checkpoint(job: Job) -> dict[str, str]:
    """Make a checkpoint of 14.5 GB in bfloat16, or a tiny one, drawn on the device, unless it exists already."""
    name = "llama-tiny" if job.small else "llama-8b"
    checkpoint = SyntheticCheckpoint(shape=SHAPES[name], device=torch.device(job.device.type))
    folder, recipe = job.work / name, checkpoint.recipe()
    if job.rank == 0 and not is_complete(folder, recipe):
        with build(folder, recipe, force=True) as draft:
            list(checkpoint.write(draft, processes=min(8, os.cpu_count() or 1)))
    return {"folder": str(folder)}


def _load_and_train(job: Job, folder: str, placement: Placement) -> dict[str, Any]:
    from peft import LoraConfig

    _free_memory(job)
    report = surgery.Report(device=job.device)
    start = time.perf_counter()
    built: Any = surgery.qlora(
        folder,
        lora=LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"),
        placement=placement,
        shard=surgery.FSDP2() if placement == "sharded" else surgery.FSDP1(),
        device=job.device,
        report=report,
    )
    load_seconds = time.perf_counter() - start
    with built as model:
        held = torch.cuda.memory_allocated(job.device) if job.on_cuda else 0
        training = _train(job, model)
    phases = report.as_dict()
    return {
        "load_seconds": round(load_seconds, 3),
        "load_peak": int(max(phase["device_peak"] for phase in phases.values())),
        "host_peak": int(max(phase["host_peak"] for phase in phases.values())),
        "held": held,
        **training,
        "phases": phases,
    }


def _free_memory(job: Job) -> None:
    """Free the previous model and its cached memory."""
    gc.collect()
    if job.on_cuda:
        torch.cuda.empty_cache()


def _train(job: Job, model: nn.Module) -> dict[str, Any]:
    """Train with AdamW on one sequence per rank, the same in every step, so that the loss must fall."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(job.rank)
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]  # a transformers model has one
    shape = (1, FEW_TOKENS if job.small else TOKENS)
    ids = torch.randint(3, vocabulary, shape, generator=generator).to(job.device)  # type: ignore[arg-type]
    losses, seconds = [], []
    if job.on_cuda:
        torch.cuda.reset_peak_memory_stats(job.device)
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(round(time.perf_counter() - start, 4))
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise AssertionError(f"expected finite losses that fall, found {losses}")
    peak = torch.cuda.max_memory_allocated(job.device) if job.on_cuda else 0
    return {"train_peak": peak, "step_seconds": seconds, "losses": losses}
