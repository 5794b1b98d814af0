"""Rank, world size and node of this process, as torchrun says in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from surgery.errors import ConfigError
from surgery.telemetry.numbers import whole_number

__all__ = [
    "Node",
    "compute_device",
    "expect_number",
    "launched_rank",
    "launched_world_size",
    "local_rank",
    "node_ranks",
]


#: Variables by which launchers of MPI say how many processes there are.
OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

#: What `accelerate launch` sets in a process that it starts alone; the last only where it was asked for several, which
#: it does not start without GPUs, or mpirun. Others set one or the other of these.
OF_ACCELERATE = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT")


def launched_rank() -> int | None:
    """`RANK`, or None without a launcher. Raises `ConfigError` for anything but a number."""
    return _number("RANK")


def launched_world_size() -> int | None:
    """`WORLD_SIZE`, or None without a launcher.

    Raises `ConfigError` for anything but a number, and, where there is no process group either, for a launcher that
    means several processes and has not said so in `WORLD_SIZE`: each would do the whole job.
    """
    size = _number("WORLD_SIZE")
    if size is None and not (dist.is_available() and dist.is_initialized()):
        _refuse_other_launchers()
    return size


def _refuse_other_launchers() -> None:
    advice = "use torchrun --nproc-per-node N, or set RANK, LOCAL_RANK and WORLD_SIZE as it does"
    for name in OF_MPI:
        if (_number(name) or 1) > 1:
            raise ConfigError(
                f"MPI has started {_number(name)} processes ({name}), but WORLD_SIZE is not set: {advice}"
            )
    if all(name in os.environ for name in OF_ACCELERATE):
        raise ConfigError(
            "accelerate launch was asked for several processes (it has set MASTER_PORT), and has started this one "
            "alone, as it does without GPUs: use torchrun --nproc-per-node N, or --num_processes 1 with MASTER_PORT "
            "unset"
        )


def local_rank() -> int | None:
    """`LOCAL_RANK`, the rank among those of this node, or None. Raises `ConfigError` for anything but a number."""
    return _number("LOCAL_RANK")


def expect_number(name: str, *, least: int, advice: str) -> int:
    """The variable `name`, a number of `least` or more. Raises `ConfigError`, with `advice`, for anything else."""
    value = os.environ.get(name)
    number = None if value is None else whole_number(value.removeprefix("-"))
    if value is None or number is None:
        raise ConfigError(f"expected the environment variable {name} to be a number, found {value!r:.80}; {advice}")
    if number < least or value.startswith("-"):
        raise ConfigError(f"expected the environment variable {name} to be {least} or more, found {value}; {advice}")
    return number


def compute_device(device: torch.device | None = None) -> torch.device:
    """`device` with its index, since threads may have other ones; None is this rank's accelerator, or the CPU."""
    if device is None and torch.cuda.is_available():
        rank = local_rank()
        device = torch.device("cuda" if rank is None else f"cuda:{rank}")
    device = device or torch.device("cpu")
    index: int | None = device.index  # which upstream declares to be there always
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and index is None else device


def _number(name: str) -> int | None:
    """The variable `name`; None where it is unset or empty."""
    value = os.environ.get(name)
    if not value:
        return None
    number = whole_number(value)
    if number is None:
        raise ConfigError(f"expected {name} to be a number, found {value!r:.80}: correct or unset it")
    return number


def node_ranks(rank: int, world_size: int) -> range:
    """The ranks of this node, by `LOCAL_WORLD_SIZE` of torchrun; all ranks if that is unset or impossible."""
    size = whole_number(os.environ.get("LOCAL_WORLD_SIZE", "")) or world_size
    if not 0 < size < world_size or world_size % size:
        return range(world_size)
    first = rank // size * size
    return range(first, first + size)


@dataclass(frozen=True, kw_only=True)
class Node:
    """The ranks of this node and, where there are several nodes, their process group."""

    ranks: range
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, rank: int, world_size: int) -> Node:
        """The node of `rank`. Collective if there are several nodes: to be called on all ranks alike."""
        ranks = node_ranks(rank, world_size)
        if len(ranks) == world_size:
            return cls(ranks=ranks)
        nodes = [range(first, first + len(ranks)) for first in range(0, world_size, len(ranks))]
        groups = [dist.new_group(list(node)) for node in nodes]
        return cls(ranks=ranks, group=groups[rank // len(ranks)])

    def converter(self, name: str, receivers: Iterable[Sequence[int]]) -> int | None:
        """The rank of this node that reads and converts the sources of the tensor `name`, and of others made with it.

        Ranks take turns. None if no rank here receives any of it; if one alone does, that one.
        """
        found = sorted({rank for ranks in receivers for rank in ranks})
        return found[sum(name.encode()) % len(found)] if found else None
