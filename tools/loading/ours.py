"""This project's ways: one loader, under every placement, and a loop of one's own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

import surgery
from loading.case import LEARNING_RATE, MAX_NORM, SEED, Case, Trainee
from loading.step import IGNORED, take_step
from surgery.config import FSDP1, FSDP2, Placement, precision
from surgery.sharding.base import strategy_of

__all__ = ["load_ours"]

POLICY = precision("bf16")


def load_ours(case: Case, placement: Placement, *, shard: FSDP1 | FSDP2 | None) -> Trainee:
    """Load like a user of `surgery.qlora`, to train in a loop of their own."""
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
    ids = case.tokens(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # a transformers model has one
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    strategy = strategy_of(model, case.device)
    step = partial(
        take_step,
        model,
        torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=case.device.type == "cuda"),
        [(ids, targets)],
        targets=case.world.size * (ids.numel() - 1),
        strategy=strategy,
        scaler=strategy.grad_scaler(enabled=False),
        max_norm=MAX_NORM,
    )
    model.train()
    return Trainee(step=lambda: step()[0], close=partial(surgery.release, model))
