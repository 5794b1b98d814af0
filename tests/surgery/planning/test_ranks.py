"""Kinds of ranks: the same as by looking at every rank, without doing so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.checkpoint import Checkpoint
from surgery.config import DDP, FSDP1, FSDP2
from surgery.passes.prepare import prepare
from surgery.planning.inventory import Inventory, take_inventory
from surgery.planning.plan import make_plan
from surgery.planning.ranks import bytes_read, classify
from surgery.planning.training import Training
from surgery.sharding.partition import chunk
from tests.surgery.planning.conftest import setting
from tests.surgery.planning.test_scale import calls

WAYS: dict[str, dict[str, Any]] = {
    "sharded": {"world_size": 48},
    "more ranks than rows": {"world_size": 3000},
    "a mesh": {"world_size": 42, "shard": FSDP2(mesh=(6, 7))},
    "a tall mesh": {"world_size": 600, "shard": FSDP2(mesh=(200, 3))},
    "rank0-cpu": {"world_size": 7, "shard": FSDP1(), "placement": "rank0-cpu"},
    "hybrid": {
        "world_size": 10,
        "shard": FSDP1(strategy="hybrid-shard", mesh=(2, 5)),
        "placement": "rank0-cpu",
    },
    "replicated": {"world_size": 5, "shard": DDP(), "placement": "replicated"},
}


@pytest.mark.parametrize("way", WAYS)
def test_kinds_are_those_of_all_ranks_compared(way: str, inventory: Inventory) -> None:
    chosen = setting(**WAYS[way])
    partition, shards = chosen.strategy.partition, chosen.strategy.at_rest.shards
    heights = {rows for unit in inventory.units for rows, _ in unit.adapters}
    expected: dict[object, list[int]] = {}
    for rank in range(chosen.world_size):
        rows = [len(partition.slice(form, rank).reads) for form in inventory.forms]
        adapters = [len(chunk(range(height), shards, rank % shards)) for height in heights]
        place = chosen.strategy.devices(rank).data
        expected.setdefault((place, *rows, *adapters), []).append(rank)
    found = classify(inventory, chosen)
    assert [list(each.ranks) for each in found] == list(expected.values())
    for each in found:
        assert each.typical in each.ranks
        assert bytes_read(inventory, chosen, each.typical) >= bytes_read(inventory, chosen, each.ranks[0])


def test_many_ranks_take_little_more_work_than_few(inventory: Inventory) -> None:
    few, many = (setting(world_size=ranks) for ranks in (100, 50_000))
    assert calls(lambda: make_plan(inventory, few, Training())) < 600_000
    assert calls(lambda: make_plan(inventory, many, Training())) < 1_000_000


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_model_that_is_not_quantized_has_no_states(folder_70b: Path, device: str) -> None:
    plain = setting(quant=None, device=torch.device(device))
    taken = take_inventory(prepare(Checkpoint.open(folder_70b), plain))
    figures = make_plan(taken, plain, Training()).of_rank(0)
    assert figures.train is not None
    assert figures.train.quant_state == figures.train.dequantized == 0
    assert figures.train.weights == pytest.approx(taken.parameters, rel=1e-3)  # two bytes, on two ranks
    held = figures.load.host_held if device == "cpu" else figures.load.device_held
    assert held == pytest.approx(figures.train.weights + figures.train.adapters, rel=0.01)
