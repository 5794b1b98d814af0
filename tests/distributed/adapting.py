"""Adapting a model on ranks whose random generators stand elsewhere, and training it for a few steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.loads import Setup, whole_tensors

__all__ = ["READING", "SEED", "Adapted", "adapt", "adapt_all", "lora_of"]

#: Of rank 0; rank i has this plus i.
SEED = 17

STEPS = 3

LORAS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    "saved": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["embed_tokens", "q_proj", "up_proj"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [0, 50, 95]},
}

#: Those that read base weights while they run, which FSDP1 does not have then, unless it keeps original parameters.
READING = ("dora", "tokens")


@dataclass(kw_only=True)
class Adapted:
    """What one rank has, whole and by plain FQN: before training, after it. trainable: FQNs of what is trained.

    is_rng_untouched: whether torch's generator stands after `qlora` where it stood before.
    """

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    trainable: set[str]
    is_rng_untouched: bool


def lora_of(name: str) -> Any:
    """One of `LORAS`; B is drawn too, where PEFT would take zeros."""
    from peft import LoraConfig

    return LoraConfig(r=4, init_lora_weights=False, **LORAS[name])


def adapt_all(checkpoint: Path, names: list[str], setup: Setup) -> dict[str, Adapted]:
    """Every one of the named adapters on this rank, one after the other."""
    return {name: adapt(checkpoint, name, setup) for name in names}


def adapt(checkpoint: Path, name: str, setup: Setup) -> Adapted:
    """One adapter, float32; to be called on all ranks alike."""
    import surgery

    torch.manual_seed(SEED + (dist.get_rank() if dist.is_initialized() else 0))
    stands = torch.get_rng_state()
    with surgery.qlora(
        checkpoint,
        lora=lora_of(name),
        placement=setup.placement,
        shard=setup.shard,
        dtype=torch.float32,
        report=surgery.Report(),
    ) as model:
        is_rng_untouched = torch.equal(stands, torch.get_rng_state())
        before = whole_tensors(model)
        train(model)
        after = whole_tensors(model)
        trainable = {name for name in after if any(each in name for each in ("lora_", "modules_to_save", "_delta"))}
    return Adapted(before=before, after=after, trainable=trainable, is_rng_untouched=is_rng_untouched)


def train(model: nn.Module) -> None:
    """SGD on this rank's part of every batch of 12."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        ids = torch.randint(3, 96, (12, 8), generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
