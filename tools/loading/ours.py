"""This project's ways: one loader, under every placement, and the training loop of `surgery finetune`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import surgery
from loading.case import LEARNING_RATE, MAX_NORM, SEED, Case, Trainee
from surgery.config import FSDP1, FSDP2, Placement, precision
from surgery.finetune.batches import IGNORED, GlobalBatch, MicroBatch, Schedule
from surgery.finetune.loop import Trainer, build_optimizer
from surgery.sharding.base import strategy_of

__all__ = ["load_ours"]

POLICY = precision("bf16")


def load_ours(case: Case, placement: Placement, *, shard: FSDP1 | FSDP2 | None) -> Trainee:
    """Load like a user of `surgery.qlora`, to train like `surgery finetune`."""
    torch.manual_seed(SEED)
    if isinstance(shard, FSDP1):
        shard = replace(shard, mixed_precision=POLICY.mixed_precision())
    if isinstance(shard, FSDP2):
        shard = replace(shard, mixed_precision=POLICY.mixed_precision_policy())
    model = surgery.qlora(
        case.options.checkpoint,
        lora=case.lora(),
        placement=placement,
        shard=shard,
        dtype=POLICY.dtype,
        device=case.device,
        report=case.report,
    )
    if case.options.activation_checkpointing:
        surgery.checkpoint_activations(model)
    trainer = _trainer(model, case)
    steps = trainer.train(itertools.repeat(_batch(model, case)))
    return Trainee(step=lambda: next(steps).loss, close=partial(surgery.release, model))


def _trainer(model: nn.Module, case: Case) -> Trainer:
    strategy = strategy_of(model, case.device)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, "adamw", lr=LEARNING_RATE),
        strategy=strategy,
        schedule=Schedule(name="constant", peak=LEARNING_RATE, steps=1),
        scaler=strategy.grad_scaler(enabled=POLICY.grad_scaler),
        device=case.device,
        autocast=POLICY.autocast,
        max_norm=MAX_NORM,
    )


def _batch(model: nn.Module, case: Case) -> GlobalBatch:
    ids = case.tokens(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # a transformers model has one
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    world = case.world.size
    return GlobalBatch(
        micro_batches=(MicroBatch(ids=ids, targets=targets, mask=None),),
        targets=world * (ids.numel() - 1),
        tokens=world * ids.numel(),
    )
