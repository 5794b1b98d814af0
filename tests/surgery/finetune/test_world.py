"""Joining the ranks that an environment describes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from surgery.comm.ranks import PeerError
from surgery.errors import ConfigError
from surgery.finetune.world import World, join_world
from tests.helpers.ranks import _free_port, run_ranks

TIMEOUT = timedelta(seconds=30)


def join() -> World:
    with join_world(timeout=TIMEOUT) as world:
        return world


def test_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        world = join()
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE to be a number, found 'two'"),
        ({"WORLD_SIZE": "1" * 5000}, "WORLD_SIZE to be a number, found '111"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE to be a number, found '²'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE to be 1 or more, found 0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE to be 1 or more, found -1"),
        ({"WORLD_SIZE": "2"}, "RANK to be a number, found None"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK to be a number, found None"),
    ],
)
def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join()


@contextmanager
def _own_group() -> Iterator[None]:
    """Outside of the group of the helper, so that one is made from the environment; afterwards it has another one."""
    port = [_free_port()]
    dist.broadcast_object_list(port, src=0)
    os.environ["MASTER_PORT"] = str(port[0])
    dist.destroy_process_group()
    yield
    os.environ["MASTER_PORT"] = str(port[0] + 1)
    dist.init_process_group("gloo", timeout=TIMEOUT)


def join_own_group(fails: bool) -> tuple[int, bool]:
    """Leave the group of the test helper, and make one from the environment; how many joined, and what is left."""
    total = torch.ones(1)
    error = KeyboardInterrupt() if fails else None
    with _own_group():
        with suppress(KeyboardInterrupt), join_world(timeout=TIMEOUT):
            dist.all_reduce(total)
            if error is not None:
                raise error
        left = dist.is_initialized()
    return int(total), left


@pytest.mark.distributed
@pytest.mark.parametrize("fails", [False, True])
def test_group_of_the_environment_is_made_and_left(fails: bool) -> None:
    assert run_ranks(join_own_group, 2, fails) == [(2, False)] * 2


def own_group_of_which_rank0_fails() -> str:
    """Rank 0 fails, which holds the store that it tells the others through; what they are told, while they wait."""
    with _own_group(), pytest.raises((MemoryError, PeerError)) as caught:
        _meet_or_fail()
    return f"{caught.typename}: {caught.value}"


def _meet_or_fail() -> None:
    with join_world(timeout=TIMEOUT) as world:
        if world.is_main:
            raise MemoryError("no memory left")
        dist.all_reduce(torch.ones(1))


@pytest.mark.distributed
def test_rank0_takes_its_store_along_last() -> None:
    says = "PeerError: rank 0 failed: MemoryError: no memory left"
    assert run_ranks(own_group_of_which_rank0_fails, 3) == ["MemoryError: no memory left", says, says]


def own_group_of_which_one_is_late() -> str:
    with _own_group(), pytest.raises(PeerError) as caught:
        _meet_late()
    return str(caught.value)


def _meet_late() -> None:
    with join_world(timeout=timedelta(seconds=2)) as world:
        if world.rank == 1:
            time.sleep(4)
        dist.all_reduce(torch.ones(1))


@pytest.mark.distributed
def test_a_rank_that_does_not_come_in_time_has_not_ended() -> None:
    on_rank0, _ = run_ranks(own_group_of_which_one_is_late, 2)
    assert "another rank has not come to where all ranks meet within 0:00:02, though none has ended" in on_rank0
    assert "--timeout" in on_rank0


def join_given_group() -> tuple[int, int, bool]:
    world = join()
    return world.rank, world.size, dist.is_initialized()


@pytest.mark.distributed
def test_group_of_the_caller_is_used_and_kept() -> None:
    assert run_ranks(join_given_group, 2) == [(0, 2, True), (1, 2, True)]
