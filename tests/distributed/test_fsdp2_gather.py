"""FSDP2 gathers what was packed: with `torch.fsdp2-bit-exact-gather` always, without it where copies are exact."""

from __future__ import annotations

import pytest

from tests.distributed.gathering import (
    BLOCKS,
    ON_FOUR,
    ON_TWO,
    STEPS,
    Case,
    Found,
    exact_and_as_on_cuda,
    needed,
    replaced,
    two_models,
    unsharded,
)
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASES = [*ON_TWO, *ON_FOUR]
Results = list[dict[bool, dict[str, tuple[Found, Found]]]]


@pytest.fixture(scope="module")
def by_world_size() -> dict[int, Results]:
    return {2: run_ranks(exact_and_as_on_cuda, 2, ON_TWO), 4: run_ranks(exact_and_as_on_cuda, 4, ON_FOUR)}


def results(case: Case, by_world_size: dict[int, Results], *, as_on_cuda: bool) -> list[tuple[Found, Found]]:
    ranks = by_world_size[2 if case in ON_TWO else 4]
    return [found[as_on_cuda][case.name] for found in ranks]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_cpu_both_are_exact(case: Case, by_world_size: dict[int, Results]) -> None:
    expected = unsharded(case)
    for stock, patched in results(case, by_world_size, as_on_cuda=False):
        assert (stock.changed, patched.changed) == (0, 0)
        assert stock.losses == patched.losses == expected.losses
        assert patched.losses[-1] != patched.losses[0], "nothing was learned"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_where_copies_rewrite_nans_the_patch_alone_is_exact(case: Case, by_world_size: dict[int, Results]) -> None:
    expected = unsharded(case)
    for stock, patched in results(case, by_world_size, as_on_cuda=True):
        assert bool(stock.changed) == case.one_dtype
        assert (stock.losses != expected.losses) == case.one_dtype
        assert patched.changed == 0
        assert patched.losses == expected.losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_wrapper_is_called_in_each_gather(case: Case, by_world_size: dict[int, Results]) -> None:
    in_backward_too = case.options.get("reshard_after_forward") is not False
    for _, patched in results(case, by_world_size, as_on_cuda=False):
        assert patched.calls == BLOCKS * STEPS * (2 if in_backward_too else 1)
        assert patched.known == (BLOCKS if case.as_held else 0)


def test_replaced_weights_are_gathered_and_nothing_keeps_the_old_ones_or_the_model() -> None:
    for by_way in run_ranks(replaced, 2):
        for way, found in by_way.items():
            assert found.changed == 0, way
            assert found.freed == [way in ("assign", "move", "empty")] * BLOCKS, way
            assert found.known == (0 if way == "install" else BLOCKS, BLOCKS, 0), way


def test_a_model_out_of_scope_is_as_stock() -> None:
    for ours, theirs in run_ranks(two_models, 2):
        assert ours.changed == 0
        assert theirs.changed > 0


def test_where_copies_rewrite_nans_it_needs_no_force_and_covers_everything_without_a_scope() -> None:
    for verdicts, found, active in run_ranks(needed, 2):
        assert verdicts == ["needed"]
        assert found.changed == 0
        assert active == []
