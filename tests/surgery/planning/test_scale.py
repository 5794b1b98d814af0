"""A model of 405B on up to 1,024 ranks: per-rank bytes, and the work that it takes to plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import surgery
from surgery.checkpoint import index
from surgery.checkpoint.header import read_header
from surgery.planning.plan import MemoryPlan
from surgery.planning.training import Training
from surgery.telemetry.numbers import say_size
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


def calls(work: Callable[[], object]) -> int:
    """Number of Python functions called while `work` is done: the same on every machine, whatever else it does."""
    count = 0

    def look(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("world", WORLDS)
def test_planning_takes_little_work(
    folder_405b: Path, plans: dict[int, MemoryPlan], monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """One look at each of 191 headers, and calls of which a core does two to three millions in a second."""
    assert set(plans) == set(WORLDS)  # everything is imported
    headers: list[Path] = []
    monkeypatch.setattr(index, "read_header", lambda file: headers.append(file) or read_header(file))
    assert calls(lambda: planned(folder_405b, world)) < 4_000_000
    assert len(headers) == len(set(headers)) == 191


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
