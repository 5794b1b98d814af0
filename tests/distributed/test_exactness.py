"""Sharded training equals upstream's single process: bits of the base model, losses and gradients of the adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import CASES, HYBRID, save_models
from tests.distributed.exactness import Case, Result, require_equal, run_cases, stock, train
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Result]:
    return {case.name: train(stock(checkpoints[case.model], case)) for case in [*CASES, *HYBRID]}


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints: dict[str, Path]) -> list[dict[str, Result]]:
    return run_ranks(run_cases, 2, checkpoints, CASES)


@pytest.fixture(scope="module")
def on_three_ranks(checkpoints: dict[str, Path]) -> list[dict[str, Result]]:
    return run_ranks(run_cases, 3, checkpoints, CASES)


@pytest.fixture(scope="module")
def on_a_mesh_of_four(checkpoints: dict[str, Path]) -> list[dict[str, Result]]:
    return run_ranks(run_cases, 4, checkpoints, HYBRID)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_stock_process(
    case: Case, expected: dict[str, Result], on_two_ranks: list[dict[str, Result]]
) -> None:
    for found in on_two_ranks:
        require_equal(found[case.name], expected[case.name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_ranks_equal_one_stock_process(
    case: Case, expected: dict[str, Result], on_three_ranks: list[dict[str, Result]]
) -> None:
    for found in on_three_ranks:
        require_equal(found[case.name], expected[case.name])


@pytest.mark.parametrize("case", HYBRID, ids=lambda case: case.name)
def test_hybrid_mesh_equals_one_stock_process(
    case: Case, expected: dict[str, Result], on_a_mesh_of_four: list[dict[str, Result]]
) -> None:
    for found in on_a_mesh_of_four:
        require_equal(found[case.name], expected[case.name])
