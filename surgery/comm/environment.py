"""Rank and world size, of the job and of the node, as torchrun sets them in the environment."""

from __future__ import annotations

import os

import torch

from surgery.errors import ConfigError
from surgery.telemetry.numbers import whole_number

__all__ = ["default_device", "expect_number", "launched_rank", "launched_world_size", "local_rank", "local_world_size"]


def launched_rank() -> int | None:
    """`RANK`, or None without a launcher. Raises `ConfigError` for anything but a number."""
    return _number("RANK")


def launched_world_size() -> int | None:
    """`WORLD_SIZE`, or None without a launcher. Raises `ConfigError` for anything but a number."""
    return _number("WORLD_SIZE")


def local_rank() -> int | None:
    """`LOCAL_RANK`, the rank among those of this node, or None. Raises `ConfigError` for anything but a number."""
    return _number("LOCAL_RANK")


def local_world_size() -> int | None:
    """`LOCAL_WORLD_SIZE`, how many ranks this node has, or None. Raises `ConfigError` for anything but a number."""
    return _number("LOCAL_WORLD_SIZE")


def expect_number(name: str, *, least: int, advice: str) -> int:
    """The variable `name`, a number of `least` or more. Raises `ConfigError`, with `advice`, for anything else."""
    value = os.environ.get(name)
    number = None if value is None else whole_number(value.removeprefix("-"))
    if value is None or number is None:
        raise ConfigError(f"expected the environment variable {name} to be a number, found {value!r:.80}; {advice}")
    if number < least or value.startswith("-"):
        raise ConfigError(f"expected the environment variable {name} to be {least} or more, found {value}; {advice}")
    return number


def default_device() -> torch.device:
    """This rank's accelerator (`LOCAL_RANK`), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = local_rank()
    return torch.device("cuda", torch.cuda.current_device() if rank is None else rank)


def _number(name: str) -> int | None:
    """The variable `name`; None where it is unset or empty."""
    value = os.environ.get(name)
    if not value:
        return None
    number = whole_number(value)
    if number is None:
        raise ConfigError(f"expected {name} to be a number, found {value!r:.80}: correct or unset it")
    return number
