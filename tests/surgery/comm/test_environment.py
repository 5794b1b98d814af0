"""Ranks and world sizes as a launcher sets them, and what is refused in their place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from surgery.comm.environment import launched_rank, launched_world_size, local_rank
from surgery.errors import ConfigError

VARIABLES: dict[str, Callable[[], int | None]] = {
    "RANK": launched_rank,
    "WORLD_SIZE": launched_world_size,
    "LOCAL_RANK": local_rank,
}


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = VARIABLES[name]
    monkeypatch.delenv(name, raising=False)
    assert read() is None
    for text, number in (("", None), ("0", 0), ("12", 12)):
        monkeypatch.setenv(name, text)
        assert read() == number


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpi_are_no_jobs_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    assert launched_world_size() is None
    monkeypatch.setenv(name, "3")
    with pytest.raises(ConfigError, match=rf"started 3 processes \({name}\), but WORLD_SIZE is not set: use torchrun"):
        launched_world_size()
    with monkeypatch.context() as scope:
        scope.setattr(dist, "is_initialized", lambda: True)  # by somebody who knows
        assert launched_world_size() is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launched_world_size() == 3


@pytest.mark.parametrize(
    ("options", "is_alone"),
    [
        (("--cpu", "--num_processes", "2"), True),
        (("--num_processes", "2"), True),
        (("--cpu", "--num_machines", "2", "--main_process_ip", "a", "--main_process_port", "1"), True),
        (("--cpu", "--num_processes", "1"), False),
        (("--cpu",), False),
    ],
)
def test_one_process_where_accelerate_was_asked_for_several(
    options: tuple[str, ...], *, is_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it starts on a machine without GPUs."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    given = launch_command_parser().parse_args([*options, "script.py"])
    given.num_machines, given.mixed_precision, given.dynamo_backend = given.num_machines or 1, "no", "no"
    given.use_cpu = given.cpu
    for name, value in prepare_simple_launcher_cmd_env(given)[1].items():
        monkeypatch.setenv(name, value)
    if not is_alone:
        assert launched_world_size() is None
        return
    with pytest.raises(ConfigError, match="has started this one alone"):
        launched_world_size()


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("text", ["two", "-1", "²", "1_0", " 1", "1" * 5000])
def test_anything_else_is_refused_by_name(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"expected {name} to be a number, found '.{{0,80}}: correct or unset it"):
        VARIABLES[name]()
