"""The sharding of a model that somebody else has sharded, and what is saved of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from surgery.sharding.base import strategy_of
from tests.helpers.ranks import run_ranks


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def found_below_the_root() -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    """By sharding, its label and whole state, of a model below another module."""
    fsdp1 = FullyShardedDataParallel(nn.Sequential(linear()), device_id=torch.device("cpu"))
    fsdp2 = nn.Sequential(linear())
    fully_shard(fsdp2)
    models = [nn.Sequential(model) for model in (fsdp1, fsdp2, DistributedDataParallel(nn.Sequential(linear())))]
    strategies = [strategy_of(model) for model in models]
    states = [strategy.trainable_state(model) for strategy, model in zip(strategies, models, strict=True)]
    return [strategy.label for strategy in strategies], states


@pytest.mark.distributed
def test_sharding_below_the_root_is_found_and_its_state_is_whole_on_rank_0() -> None:
    (labels, states), (elsewhere, nothing) = run_ranks(found_below_the_root, 2)
    assert labels == elsewhere == ["FSDP1", "FSDP2", "DDP"]
    assert nothing == [{}] * 3
    expected = {f"0.0.{name}": parameter.data for name, parameter in linear().named_parameters()}
    for state in states:
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_a_plain_model_is_unsharded() -> None:
    assert strategy_of(linear()).label == "unsharded"
