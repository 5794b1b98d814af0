"""Steps with kernels, in one process and on ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

import surgery

STANDIN = Path(__file__).parents[2] / "helpers" / "standin"

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def adapter() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def step(model: Any, *, learn: bool = False) -> float:
    """The loss of a batch; its gradients are added, or learnt from."""
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if learn:
        torch.optim.SGD(trained, lr=0.1).step()
        model.zero_grad()
    return float(loss.detach())


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _build(folder: Path, shard: Any, kernels: str) -> Any:
    os.environ["TRITON_INTERPRET"] = "1"
    if str(STANDIN) not in sys.path:
        sys.path.insert(0, str(STANDIN))
    torch.manual_seed(1)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "lora": adapter()}
    return surgery.qlora(folder, shard=shard, kernels=kernels, **options)


def on_ranks(folder: Path) -> tuple[dict[str, tuple[list[float], dict[str, int]]], str]:
    """Losses of three steps by strategy, each rank with the whole batch, and calls of kernels; and what `differing` is
    told.
    """
    found = {}
    for shard in (surgery.FSDP2(), surgery.FSDP1(), surgery.DDP()):
        with _build(folder, shard, "liger") as model:
            from liger_kernel import CALLS

            CALLS.clear()
            losses = [step(model, learn=True) for _ in range(3)]
            found[type(shard).__name__] = losses, dict(CALLS)
    return found, differing(folder)


def differing(folder: Path) -> str:
    """What is said where rank 1 asks for kernels and rank 0 does not."""
    try:
        _build(folder, None, "liger" if dist.get_rank() else "")
    except surgery.ConfigError as error:
        return str(error)
    raise AssertionError("ranks differ")
