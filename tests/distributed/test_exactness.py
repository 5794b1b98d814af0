"""Sharded training equals upstream's single process: bits of the base model, losses and gradients of the adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery.config import FSDP2
from tests.distributed.cases import CASES, ON_FOUR, ON_ONE, ON_THREE, ON_TWO, save_models
from tests.distributed.exactness import (
    Case,
    Result,
    ours,
    require_equal,
    require_same_training,
    run_cases,
    stock,
    train,
)
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # a test's fixture runs all cases

Results = dict[str, Result]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("checkpoints"))


#: One case for each result that a stock process can have.
BASES = {case.base: case for case in [*CASES, *ON_TWO, *ON_FOUR]}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> Results:
    """By `Case.base`."""
    return {base: train(stock(checkpoints[case.model], case)) for base, case in BASES.items()}


@pytest.fixture(scope="module")
def on_one_rank(checkpoints: dict[str, Path]) -> list[Results]:
    return run_ranks(run_cases, 1, checkpoints, ON_ONE)


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints: dict[str, Path]) -> list[Results]:
    return run_ranks(run_cases, 2, checkpoints, [*CASES, *ON_TWO], timeout=600)


@pytest.fixture(scope="module")
def on_three_ranks(checkpoints: dict[str, Path]) -> list[Results]:
    return run_ranks(run_cases, 3, checkpoints, ON_THREE, timeout=600)


@pytest.fixture(scope="module")
def on_four_ranks(checkpoints: dict[str, Path]) -> list[Results]:
    return run_ranks(run_cases, 4, checkpoints, ON_FOUR)


def require_all_equal(case: Case, ranks: list[Results], expected: Results) -> None:
    for found in ranks:
        require_equal(found[case.name], expected[case.base])


@pytest.mark.parametrize("base", sorted(BASES))
def test_one_stock_process_is_what_the_table_gives(base: str, checkpoints: dict[str, Path], expected: Results) -> None:
    """What everything else is compared with runs the same kernels; here no kernel of bitsandbytes is in the way."""
    case = BASES[base]
    require_same_training(expected[base], train(stock(checkpoints[case.model], case, by_table=True)))


@pytest.mark.parametrize("case", ON_ONE, ids=lambda case: case.name)
def test_one_rank_equals_one_stock_process(case: Case, expected: Results, on_one_rank: list[Results]) -> None:
    require_all_equal(case, on_one_rank, expected)


@pytest.mark.parametrize("case", [*CASES, *ON_TWO], ids=lambda case: case.name)
def test_two_ranks_equal_one_stock_process(case: Case, expected: Results, on_two_ranks: list[Results]) -> None:
    require_all_equal(case, on_two_ranks, expected)


@pytest.mark.parametrize("case", ON_THREE, ids=lambda case: case.name)
def test_three_ranks_equal_one_stock_process(case: Case, expected: Results, on_three_ranks: list[Results]) -> None:
    require_all_equal(case, on_three_ranks, expected)


@pytest.mark.parametrize("case", ON_FOUR, ids=lambda case: case.name)
def test_four_ranks_equal_one_stock_process(case: Case, expected: Results, on_four_ranks: list[Results]) -> None:
    require_all_equal(case, on_four_ranks, expected)


def train_in_bf16(checkpoint: Path, case: Case) -> Result:
    with ours(checkpoint, case, dtype=torch.bfloat16) as model:
        return train(model)


def test_base_model_computed_in_bf16_is_that_of_one_process(checkpoints: dict[str, Path]) -> None:
    """Losses differ by the order in which bfloat16 adds up; what is stored and gathered does not."""
    case = Case(name="bf16", kind=FSDP2, model="odd")
    alone = train_in_bf16(checkpoints["odd"], case)
    assert len(alone.packed) == 14
    for found in run_ranks(train_in_bf16, 2, checkpoints["odd"], case):
        assert found.packed.keys() == alone.packed.keys()
        for name, packed in alone.packed.items():
            assert torch.equal(found.packed[name], packed), name
        assert found.losses == pytest.approx(alone.losses, rel=1e-2)
