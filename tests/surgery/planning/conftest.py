"""Shared by the tests of plans: checkpoints of large models that weigh nothing, and their inventories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from surgery.checkpoint import Checkpoint
from surgery.config import FSDP2, Quant
from surgery.passes.prepare import prepare
from surgery.passes.setting import Setting
from surgery.planning.inventory import Inventory, take_inventory
from tests.helpers.hollow import LLAMA_70B, LLAMA_405B, write_hollow


def lora(r: int = 16) -> LoraConfig:
    return LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")


def setting(**changes: object) -> Setting:
    """Placement sharded under FSDP2 on two GPUs, but for `changes`."""
    options: dict[str, object] = {
        "world_size": 2,
        "placement": "sharded",
        "shard": FSDP2(),
        "quant": Quant(),
        "lora": lora(),
        "dtype": torch.bfloat16,
        "compute_dtype": torch.bfloat16,
        "device": torch.device("cuda"),
    }
    return Setting(**(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def folder_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("70b"), LLAMA_70B, shards=30)


@pytest.fixture(scope="session")
def folder_405b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("405b"), LLAMA_405B, shards=191)


@pytest.fixture(scope="session")
def inventory(folder_70b: Path) -> Inventory:
    return take_inventory(prepare(Checkpoint.open(folder_70b), setting()))
