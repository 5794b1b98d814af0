"""Ranks that were told different things say so, alike, before a weight is read, and can go on together after it."""

from __future__ import annotations

import pytest

from tests.distributed.disagreeing import SAME, SAYS, copies, differing
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(differing, 2, copies(tmp_path_factory.mktemp("checkpoints")), timeout=120)


@pytest.mark.parametrize("case", SAYS)
def test_every_rank_says_what_differs(case: str, said: list[dict[str, str]]) -> None:
    on_rank0, on_rank1 = (messages[case] for messages in said)
    assert on_rank0 == on_rank1
    assert on_rank0.startswith("the ranks differ in ")
    for text in SAYS[case]:
        assert text in on_rank0


@pytest.mark.parametrize("case", SAME)
def test_what_comes_to_the_same_is_loaded(case: str, said: list[dict[str, str]]) -> None:
    assert said[0][case] == said[1][case]
