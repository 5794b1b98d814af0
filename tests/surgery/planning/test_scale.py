"""A model of 405B on up to 1,024 ranks: per-rank bytes, and the time it takes to plan."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import surgery
from surgery.planning.plan import MemoryPlan
from surgery.planning.setting import Training
from surgery.planning.sizes import say_size
from tests.surgery.planning.conftest import lora

WORLDS = (8, 64, 256, 1024)


def planned(folder: Path, world: int) -> MemoryPlan:
    return surgery.plan(folder, world_size=world, lora=lora(), training=Training(checkpointing=True))


def row(plan: MemoryPlan) -> str:
    """The row of `docs/plan.md` for `plan`: of the ranks that need most."""
    figures = max((figures for _, figures in plan.classes), key=lambda each: each.device_peak)
    assert figures.train is not None
    sizes = (
        figures.bytes_read,
        figures.train.weights,
        figures.train.quant_state,
        figures.load.device_held,
        figures.load.device_peak,
        figures.train.device_peak,
    )
    return f"| {plan.setting.world_size:,} | {' | '.join(map(say_size, sizes))} |"


@pytest.fixture(scope="module")
def plans(folder_405b: Path) -> dict[int, MemoryPlan]:
    return {world: planned(folder_405b, world) for world in WORLDS}


def test_planning_takes_less_than_five_seconds(folder_405b: Path, plans: dict[int, MemoryPlan]) -> None:
    assert set(plans) == set(WORLDS)  # everything is imported
    for world in WORLDS:
        start = time.perf_counter()
        planned(folder_405b, world)
        assert time.perf_counter() - start < 5


def test_what_a_rank_reads_and_keeps_falls_with_their_number(plans: dict[int, MemoryPlan]) -> None:
    total = 2 * plans[8].inventory.parameters
    for world, plan in plans.items():
        for ranks, figures in plan.classes:
            assert figures.bytes_read * world <= 1.001 * total
            assert figures.train is not None
            assert figures.train.weights * world == pytest.approx(plans[8].of_rank(0).train.weights * 8, rel=1e-3)  # type: ignore[union-attr]
            assert len(ranks.ranks) <= world


def test_every_rank_is_in_one_class(plans: dict[int, MemoryPlan]) -> None:
    for world, plan in plans.items():
        assert sorted(rank for ranks, _ in plan.classes for rank in ranks.ranks) == list(range(world))
        with pytest.raises(IndexError, match=f"below {world}"):
            plan.of_rank(world)


def test_ranks_read_the_checkpoint_once_together(plans: dict[int, MemoryPlan]) -> None:
    """But for two blocks a tensor and rank."""
    inventory = plans[64].inventory
    together = sum(figures.bytes_read * len(ranks.ranks) for ranks, figures in plans[64].classes)
    assert 0 <= together - 2 * inventory.parameters <= 2 * 2 * 64 * len(inventory.targets) * 64


def test_the_page_has_these_figures(plans: dict[int, MemoryPlan]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()
    assert [row(plan) for plan in plans.values() if row(plan) not in page] == []


def test_the_whole_quant_state_is_on_every_rank(plans: dict[int, MemoryPlan]) -> None:
    sizes = {figures.train.quant_state for plan in plans.values() for _, figures in plan.classes if figures.train}
    assert len(sizes) == 1
    assert sizes.pop() == pytest.approx(6.4e9, rel=0.01)
