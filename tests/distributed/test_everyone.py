"""Blocks that all ranks leave together, one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from surgery.comm.failures import everyone
from surgery.comm.ranks import PeerError, Ranks, current_ranks
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
ROUNDS = 200


class InjectedError(Exception):
    """Raised by the tests."""


def fail_at_once(fails: bool) -> None:
    if fails:
        raise InjectedError("at once")


def blocks_left(ranks: Ranks) -> list[str]:
    """How this rank leaves a block in which nothing fails, and the next, in which rank 1 fails at once."""
    left = []
    for fails in (False, True):
        try:
            with everyone(ranks, device=CPU):
                fail_at_once(fails and ranks.rank == 1)
        except (InjectedError, PeerError) as error:
            left.append(str(error))
        else:
            left.append("")
    return left


def rounds() -> list[list[str]]:
    return [blocks_left(current_ranks()) for _ in range(ROUNDS)]


def test_failure_is_of_the_block_that_it_happened_in() -> None:
    """A rank that is late in leaving one block does not take a failure in the next for one in that."""
    for rank, left in enumerate(run_ranks(rounds, 3)):
        assert left == [["", "at once" if rank == 1 else "rank 1 failed: InjectedError: at once"]] * ROUNDS


def every_rank_fails() -> str:
    ranks = current_ranks()
    with pytest.raises(InjectedError) as caught, everyone(ranks, device=CPU):
        raise InjectedError(f"on {ranks.rank}")
    dist.barrier()
    return str(caught.value)


def test_every_rank_keeps_its_own_error() -> None:
    assert run_ranks(every_rank_fails, 2) == ["on 0", "on 1"]


def test_alone_nothing_is_exchanged() -> None:
    ranks = Ranks()
    with everyone(ranks, device=CPU):
        ranks.raise_peer_failure()
    with pytest.raises(InjectedError), everyone(ranks, device=CPU):
        raise InjectedError
