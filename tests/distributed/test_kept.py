"""Parameters that upstream keeps in float32 in a model in bfloat16 are so when it is sharded, and trains exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.exactness import Case
from tests.distributed.kept import KEPT, MODELS, Seen, losses_of_stock, on_a_rank
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # a test's fixture runs all cases

Losses = dict[str, list[float]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kept")
    return {name: save_tiny(root / name, kind, **changes) for name, (kind, changes) in MODELS.items()}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> Losses:
    return {name: losses_of_stock(checkpoint) for name, checkpoint in checkpoints.items()}


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints: dict[str, Path]) -> list[Seen]:
    return run_ranks(on_a_rank, 2, checkpoints, timeout=500)


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_two_ranks_lose_what_stock_loses(case: Case, expected: Losses, on_two_ranks: list[Seen]) -> None:
    wanted = expected[case.model]
    assert len(set(wanted)) == len(wanted), "nothing was learned"
    for found in on_two_ranks:
        assert found.losses[case.name] == pytest.approx(wanted, abs=1e-5)


def test_casting_them_is_refused_before_a_weight_is_read(on_two_ranks: list[Seen]) -> None:
    for found in on_two_ranks:
        assert "model.layers.1.mlp.gate.weight" in found.refusal
        assert "param_dtype=None" in found.refusal
        assert found.bytes_read == 0
