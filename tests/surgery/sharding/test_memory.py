"""What strategies say of the memory of a step, and of the moments in which a model is sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.config import DDP, FSDP1, FSDP2
from surgery.sharding.base import Unit, strategy_for

#: Three blocks, whole: 110, 220 and 330; embedding 40, tail 50, root 6.
UNITS = [
    *(Unit(kind="block", weights=100 * number, adapters=10 * number) for number in (1, 2, 3)),
    Unit(kind="embedding", weights=40, adapters=0),
    Unit(kind="tail", weights=49, adapters=1),
    Unit(kind="root", weights=6, adapters=0),
]
ALL, FROZEN = 756, 695
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "at_loss", "in_backward"),
    [
        (FSDP2(), 2 * 50 + 6, 3 * 330 + 6),
        (FSDP2(mesh=(2, 2)), 2 * 50 + 6, 3 * 330 + 6),
        (FSDP2(mesh=(4, 1)), 0, 0),
        (FSDP2(reshard_after_forward=False), ALL, ALL),
        (FSDP2(reshard_after_forward=2), 2 * 50 + 6, 3 * 330 + 6),
        (FSDP1(), 40 + 50 + 6, 330 + 220 + 96),
        (FSDP1(strategy="shard-grad-op"), ALL, ALL),
        (FSDP1(strategy="no-shard"), 0, 0),
        (DDP(), 0, 0),
        (None, 0, 0),
    ],
    ids=str,
)
def test_what_is_gathered(options: Any, at_loss: int, in_backward: int) -> None:
    strategy = strategy_for(options, world_size=4, device=CUDA)
    assert (strategy.gathered_at_loss(UNITS), strategy.gathered_in_backward(UNITS)) == (at_loss, in_backward)


@pytest.mark.parametrize(
    ("options", "placement", "rank", "moments"),
    [
        (None, None, 0, []),
        (DDP(), None, 0, []),
        (FSDP2(), None, 0, []),
        (FSDP2(), "replicated", 1, [(0, FROZEN)]),
        # What is left on rank 0's host; what it holds (5 are never sharded), a unit twice, and the shard of it.
        (FSDP1(), None, 0, [(695, 5 + 200 + 50), (595, 55 + 400 + 100), (395, 155 + 600 + 150), (95, 305 + 190 + 48)]),
        (FSDP1(), None, 1, [(0, 5 + 200 + 50), (0, 55 + 400 + 100), (0, 155 + 600 + 150), (0, 305 + 190 + 48)]),
        # Units are where they are needed; those that are left are there too.
        (FSDP1(), "replicated", 1, [(0, 155 + 695), (0, 355 + 595), (0, 605 + 395), (0, 448 + 95)]),
    ],
    ids=str,
)
def test_moments_of_sharding(options: Any, placement: str | None, rank: int, moments: list[tuple[int, int]]) -> None:
    strategy = strategy_for(options, world_size=2, device=CUDA, placement=placement)
    assert list(strategy.finishing_peaks(UNITS, unsharded=5, rank=rank)) == moments


def test_rank_0_of_a_cpu_shards_where_weights_are() -> None:
    strategy = strategy_for(FSDP1(), world_size=2, device=torch.device("cpu"))
    assert next(iter(strategy.finishing_peaks(UNITS, unsharded=5, rank=0))) == (695, 5 + 100 + 50)
    assert next(iter(strategy.finishing_peaks(UNITS, unsharded=5, rank=1))) == (0, 5 + 200 + 50)


@pytest.mark.parametrize(
    ("options", "placement", "data", "adapters", "rows"),
    [
        (FSDP2(), None, ("cuda", "cuda"), "cuda", range(2, 3)),
        (FSDP2(cpu_offload=True), None, ("cpu", "cpu"), "cpu", range(2, 3)),
        (FSDP2(cpu_offload=True), "replicated", ("cuda", "cuda"), "cpu", range(3)),
        (FSDP1(), None, ("cpu", "meta"), "cpu", range(3)),
        (FSDP1(cpu_offload=True), "replicated", ("cuda", "cuda"), "cpu", range(3)),
        (DDP(), None, ("cuda", "cuda"), "cpu", range(3)),
        (None, None, ("cuda", "cuda"), "cpu", range(3)),
    ],
    ids=str,
)
def test_where_values_wait(
    options: Any, placement: str | None, data: tuple[str, str], adapters: str, rows: range
) -> None:
    strategy = strategy_for(options, world_size=2, device=CUDA, placement=placement)
    assert tuple(strategy.devices(rank).data.type for rank in (0, 1)) == data
    assert strategy.devices(1).compute == CUDA
    assert strategy.adapter_device(1).type == adapters
    assert strategy.adapter_rows(1, 3) == rows
