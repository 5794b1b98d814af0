"""Joining the ranks that an environment describes."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

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


def join_own_group(fails: bool) -> tuple[int, bool]:
    """Leave the group of the test helper, and make one from the environment; how many joined, and what is left."""
    port = [_free_port()]
    dist.broadcast_object_list(port, src=0)
    os.environ["MASTER_PORT"] = str(port[0])
    dist.destroy_process_group()
    total = torch.ones(1)
    error = KeyboardInterrupt() if fails else None
    with suppress(KeyboardInterrupt), join_world(timeout=TIMEOUT):
        dist.all_reduce(total)
        if error is not None:
            raise error
    left = dist.is_initialized()
    os.environ["MASTER_PORT"] = str(port[0] + 1)
    dist.init_process_group("gloo", timeout=TIMEOUT)  # which the helper ends
    return int(total), left


@pytest.mark.distributed
@pytest.mark.parametrize("fails", [False, True])
def test_group_of_the_environment_is_made_and_left(fails: bool) -> None:
    assert run_ranks(join_own_group, 2, fails) == [(2, False)] * 2


def join_given_group() -> tuple[int, int, bool]:
    world = join()
    return world.rank, world.size, dist.is_initialized()


@pytest.mark.distributed
def test_group_of_the_caller_is_used_and_kept() -> None:
    assert run_ranks(join_given_group, 2) == [(0, 2, True), (1, 2, True)]
