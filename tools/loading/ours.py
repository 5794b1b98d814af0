"""This project's ways: one loader, under every placement, and the same loop as the others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

import surgery
from loading.case import SEED, Case, Trainee
from loading.loops import adamw, plain_step
from surgery.config import FSDP1, FSDP2, Placement

__all__ = ["load_ours"]

DTYPE = torch.bfloat16


def load_ours(case: Case, placement: Placement, *, shard: FSDP1 | FSDP2 | None, packed: bool = False) -> Trainee:
    """Load like a user of `surgery.qlora`, to train in a loop of their own."""
    torch.manual_seed(SEED)
    if isinstance(shard, FSDP1):
        shard = replace(shard, mixed_precision=MixedPrecision(reduce_dtype=torch.float32))
    if isinstance(shard, FSDP2):
        shard = replace(shard, mixed_precision=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    model = surgery.qlora(
        (case.options.packed if packed else None) or case.options.checkpoint,
        lora=case.lora(),
        placement=placement,
        shard=shard,
        dtype=DTYPE,
        device=case.device,
        report=case.report,
    )
    if case.options.activation_checkpointing:
        surgery.checkpoint_activations(model)
    ids = case.tokens(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # a transformers model has one
    clip = getattr(model, "clip_grad_norm_", partial(nn.utils.clip_grad_norm_, list(model.parameters())))
    return Trainee(step=plain_step(model, adamw(model), ids, clip=clip), close=partial(surgery.release, model))
