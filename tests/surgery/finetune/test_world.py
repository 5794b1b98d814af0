"""Joining the ranks that an environment describes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from surgery.errors import ConfigError
from surgery.finetune.world import World, join_world
from tests.helpers.ranks import run_ranks

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
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE to be 1 or more, found 0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE to be 1 or more, found -1"),
        ({"WORLD_SIZE": "2"}, "RANK to be a number, found None"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK to be a number, found None"),
    ],
)
def test_incomplete_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join()


def join_own_group(fails: bool) -> tuple[int, bool]:
    """Take over from the group of the test helper, and make one from the environment."""
    dist.destroy_process_group()
    try:
        with join_world(timeout=TIMEOUT) as world:
            total = torch.ones(1)
            dist.all_reduce(total)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        world = World(rank=-1, size=int(total), device=torch.device("cpu"))
    left = dist.is_initialized()
    if not left:
        dist.init_process_group("gloo", timeout=TIMEOUT)  # for the helper's own end
    return world.size, left


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
