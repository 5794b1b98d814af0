"""`torch.fsdp1-sync-on-cpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, _init_utils

import patches
from patches.builtin.torch.fsdp1_sync_on_cpu import cpu_states_are_refused

from .four_bit import unchanged

ID = "torch.fsdp1-sync-on-cpu"


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def synced() -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        nn.Linear(2, 2),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        sync_module_states=True,
        device_id=torch.device("cpu"),
    )


@pytest.mark.usefixtures("gloo")
def test_stock_fsdp_refuses() -> None:
    with pytest.raises(ValueError, match="CPU parameters"):
        synced()
    assert cpu_states_are_refused()


@pytest.mark.usefixtures("gloo")
def test_fsdp_syncs_over_gloo_and_refuses_again_afterwards() -> None:
    with unchanged(_init_utils), patches.transaction(ID, reason="test"):
        assert synced()(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(ValueError, match="CPU parameters"):
        synced()


def test_group_that_cannot_carry_cpu_tensors_gets_the_stock_error(tmp_path: Path) -> None:
    """gloo for CUDA tensors alone stands for nccl, which a machine without a GPU does not have."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cuda:gloo", store=store, rank=0, world_size=1)
    try:
        with patches.transaction(ID, reason="test"), pytest.raises(ValueError, match="CPU parameters"):
            _init_utils._check_module_states_for_sync_module_states([torch.zeros(1)])
    finally:
        dist.destroy_process_group()
