"""Experts in 4 bits under FSDP1: as one process trains them, whatever its flat parameters are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import surgery
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

RANKS = 3

#: How ranks share it; whether experts are adapted too.
CASES: dict[str, tuple[Any, str | None, bool]] = {
    "adapters in units of their own": (surgery.FSDP1(), "rank0-cpu", True),
    "adapters in the block's": (surgery.FSDP1(use_orig_params=True, units="block"), "replicated", True),
    "kept gathered": (surgery.FSDP1(strategy="shard-grad-op"), None, True),
    "linear layers alone": (surgery.FSDP1(), None, False),
    "replicated": (surgery.DDP(), None, True),
}


def lora(*, experts: bool) -> LoraConfig:
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=named, task_type="CAUSAL_LM")


def train(folder: Path, out: Path, shard: Any, placement: str | None, *, experts: bool) -> list[float]:
    """The losses of three steps, on this rank's share of the same samples; the adapter is saved in `out`."""
    rank, world = (0, 1) if shard is None else (torch.distributed.get_rank(), RANKS)
    ids = torch.randint(3, 90, (6, 8), generator=torch.Generator().manual_seed(0)).chunk(world)[rank]
    torch.manual_seed(0)
    options = {"shard": shard, "placement": placement, "dtype": torch.float32, "report": surgery.Report()}
    with surgery.qlora(folder, lora=lora(experts=experts), **options) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        surgery.attest(model)
        surgery.save_adapter(model, out)
    return losses


def run_cases(folder: Path, out: Path) -> dict[str, list[float]]:
    return {
        name: train(folder, out / name, shard, placement, experts=experts)
        for name, (shard, placement, experts) in CASES.items()
    }


def test_training_is_that_of_one_process(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=48)
    by_rank = run_ranks(run_cases, RANKS, folder, tmp_path)
    for experts in (True, False):
        expected = train(folder, tmp_path / "one", None, None, experts=experts)
        weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
        for name in (name for name, case in CASES.items() if case[2] == experts):
            losses = torch.tensor([found[name] for found in by_rank]).mean(dim=0)
            torch.testing.assert_close(losses, torch.tensor(expected), rtol=0, atol=1e-6)
            found = load_file(tmp_path / name / "adapter_model.safetensors")
            assert found.keys() == weights.keys()
            for key, weight in weights.items():
                torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-6, msg=f"{name}: {key}")
                assert "lora_B" not in key or found[key].any(dim=1).all(), f"{name}: {key}"
