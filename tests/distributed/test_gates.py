"""Gates, where all ranks enter collectives or none does, whatever makes one of them leave, and whenever."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from surgery.comm import heartbeat
from surgery.comm.ranks import PeerError, Ranks, StoppedError, current_ranks
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROUNDS = 300


def go_through(ranks: Ranks, name: str, stop: threading.Event) -> None:
    ranks.arrive(name, stop=stop)
    ranks.pass_gate(name, stop=stop)


def passed(ranks: Ranks, stop: threading.Event, name: str) -> bool:
    """Whether this rank went through the gate; if it did not, the others are told, as `everyone` does."""
    try:
        go_through(ranks, name, stop)
    except StoppedError as error:
        ranks.report_failure(error)
        return False
    except PeerError:
        return False
    return True


def stopped_at_any_time() -> list[bool]:
    """In every round one rank is stopped from another thread, at about when the others come to the gate.

    In one of ten rounds long before that, and in another never.
    """
    found = []
    for number in range(ROUNDS):
        ranks, stop = current_ranks(), threading.Event()
        chance = random.Random(100 * number + ranks.rank)
        timer = threading.Timer(chance.uniform(0, 0.002), stop.set)
        if ranks.rank == number % ranks.world_size and number % 10 == 0:
            stop.set()
        elif ranks.rank == number % ranks.world_size and number % 10 != 1:
            timer.start()
        time.sleep(chance.uniform(0, 0.002))
        found.append(passed(ranks, stop, "one"))
        timer.cancel()
        dist.barrier()
    return found


def test_all_ranks_pass_or_none() -> None:
    by_rank = run_ranks(stopped_at_any_time, 3)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    assert len(by_rank[0]) == ROUNDS
    assert set(by_rank[0]) == {True, False}, "both happened"


def stopped_before() -> list[bool]:
    ranks, stop = current_ranks(), threading.Event()
    first = passed(ranks, stop, "first")
    if ranks.rank == 1:
        stop.set()
    return [first, passed(ranks, stop, "second")]


def test_a_rank_that_is_stopped_lets_nobody_through_the_next_gate() -> None:
    assert run_ranks(stopped_before, 3) == [[True, False]] * 3


def silent() -> str:
    """Rank 1 shows no sign of life any more while the others wait at a gate for it."""
    heartbeat.BEAT, heartbeat.SILENCE = 0.01, 200
    ranks, stop = current_ranks(), threading.Event()
    if ranks.rank == 1:
        ranks.count(beats(ranks, 1), 1)
    dist.barrier()
    if ranks.rank == 1:
        wait_until(ranks, "others/missed", 2)
        return ""
    with pytest.raises(PeerError) as caught, heartbeat.beating(ranks):
        go_through(ranks, "one", stop)
    assert ranks.desynced.is_set()
    ranks.count("others/missed", 1)
    return f"{caught.value} {caught.value.rank}"


def test_a_rank_that_is_silent_is_missed() -> None:
    missed = "rank 1 has ended without a word: its own output, or the kernel's log, says why 1"
    assert run_ranks(silent, 3) == [missed, "", missed]


def beats(ranks: Ranks, rank: int) -> str:
    """Where the beats of a rank are counted."""
    return f"{ranks.prefix}/heartbeat/{rank}"


def wait_until(ranks: Ranks, key: str, least: int) -> int:
    """The value of a counter that all ranks share, once it is `least` or more."""
    while (value := ranks.count(key, 0)) < least:
        time.sleep(0.005)
    return value


def slow() -> int:
    """Rank 1 is slow to come to a gate, and then leaves long before the others: it is alive all the time.

    Slower than a rank that counts as gone: by so many beats of the rank that watches it. Those of the last wait.
    """
    heartbeat.BEAT, heartbeat.SILENCE = 0.01, 200
    ranks, stop = current_ranks(), threading.Event()
    longer = heartbeat.SILENCE + 50
    with heartbeat.beating(ranks):
        if ranks.rank == 1:
            wait_until(ranks, beats(ranks, 0), longer)
        go_through(ranks, "one", stop)
        mine = ranks.count(beats(ranks, ranks.rank), 0)
        if ranks.rank != 1:
            wait_until(ranks, beats(ranks, 1), heartbeat.LEFT)
            wait_until(ranks, beats(ranks, ranks.rank), mine + longer)
        ranks.raise_peer_failure()
    assert not [thread for thread in threading.enumerate() if thread.name == "surgery-heartbeat"]
    return mine


def test_a_rank_that_is_slow_is_waited_for() -> None:
    on_rank0, _, _ = run_ranks(slow, 3)
    assert on_rank0 >= 250, "beats at the gate"


def late() -> str:
    """Rank 1 lives, and does not come to the gate within the time limit of the store."""
    ranks, stop = current_ranks(), threading.Event()
    limit = ranks.store.timeout
    with heartbeat.beating(ranks):
        if ranks.rank == 1:
            wait_until(ranks, "others/left", 1)
            return ""
        ranks.store.set_timeout(timedelta(seconds=1))
        with pytest.raises(PeerError) as caught:
            go_through(ranks, "one", stop)
    ranks.store.set_timeout(limit)
    ranks.count("others/left", 1)
    return str(caught.value)


def test_a_gate_has_the_time_limit_of_the_process_group() -> None:
    on_rank0, _ = run_ranks(late, 2)
    assert on_rank0.startswith(
        "another rank has not come to where all ranks meet within 0:00:01, though none has ended"
    )


def test_alone_nobody_is_waited_for() -> None:
    ranks, stop = Ranks(), threading.Event()
    with heartbeat.beating(ranks):
        go_through(ranks, "one", stop)
        assert not [thread for thread in threading.enumerate() if thread.name == "surgery-heartbeat"]
        stop.set()
        with pytest.raises(StoppedError):
            go_through(ranks, "two", stop)
