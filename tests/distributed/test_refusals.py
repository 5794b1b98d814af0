"""Two ranks refuse alike what they cannot do, before weights are read, and can still work together after it."""

from __future__ import annotations

import pytest

from tests.distributed.misfits import SAYS
from tests.distributed.refusals import REFUSALS, Refusal, refused_on_this_rank
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(refused_on_this_rank, 2, save_tiny(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_every_rank_says_what_cannot_work(refusal: Refusal, said: list[dict[str, str]]) -> None:
    on_rank0, on_rank1 = (messages[refusal.name] for messages in said)
    assert on_rank0 == on_rank1
    for text in refusal.says:
        assert text in on_rank0
    assert "Receipt" not in on_rank0


@pytest.mark.parametrize("misfit", SAYS, ids=lambda misfit: misfit.__name__)
def test_every_rank_says_what_a_quantizer_has_promised(misfit: type, said: list[dict[str, str]]) -> None:
    """On one of two ranks a run may be larger, and the numbers are others."""
    for messages in said:
        for text in (f"QuantizerError: {misfit.__name__}: expected", *SAYS[misfit]):
            assert text in messages[misfit.__name__]


def test_ranks_are_still_in_step(said: list[dict[str, str]]) -> None:
    for kind in ("FSDP1", "FSDP2"):
        assert said[0][kind] == said[1][kind]
        assert float(said[0][kind]) == pytest.approx(4.56, abs=0.5)
