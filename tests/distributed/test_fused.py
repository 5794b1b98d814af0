"""Fused 4-bit LoRA layers in every sharding: the losses of one process, and the same adapters on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig

import surgery
from surgery.step.fuse import fuse
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

IDS = torch.randint(3, 96, (4, 8), generator=torch.Generator().manual_seed(0))

WAYS: dict[str, dict[str, Any]] = {
    "FSDP2": {"shard": surgery.FSDP2(), "checkpoints": True},
    "FSDP2, statistics sharded": {"shard": surgery.FSDP2(), "quant": surgery.Quant(shard_statistics=True)},
    "FSDP1": {"shard": surgery.FSDP1(), "checkpoints": True},
    "DDP": {"shard": surgery.DDP()},
}


def trained(checkpoint: Path, *, is_fused: bool, checkpoints: bool = False, **options: Any) -> tuple[list[float], Any]:
    """Losses of this rank over three steps, and the adapters after them, on rank 0."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    with surgery.qlora(checkpoint, lora=lora, dtype=torch.float32, report=surgery.Report(), **options) as model:
        if is_fused:
            assert fuse(model) == 14
        if checkpoints:
            surgery.checkpoint_activations(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        part, losses = IDS.chunk(size)[rank], []
        for _ in range(3):
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses, surgery.adapter_state(model)


def in_every_way(checkpoint: Path) -> dict[str, Any]:
    return {way: trained(checkpoint, is_fused=True, **options) for way, options in WAYS.items()}


def test_trains_as_peft_does_in_one_process(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", dtype=torch.float32, intermediate_size=128)
    _, expected = trained(checkpoint, is_fused=False)
    first, second = run_ranks(in_every_way, 2, checkpoint)
    for way, (_, state) in first.items():
        assert state.keys() == expected.keys(), way
        assert max(float((state[name] - expected[name]).abs().max()) for name in expected) < 2e-6, way
        assert second[way][0] == pytest.approx(second["DDP"][0], rel=1e-6), way
