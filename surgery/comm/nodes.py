"""Which ranks are on this node: what is read once per node is read by one of them for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch.distributed as dist

from surgery.comm.environment import local_world_size
from surgery.errors import ConfigError

__all__ = ["Node", "node_ranks"]


def node_ranks(rank: int, world_size: int) -> range:
    """The ranks of this node, by `LOCAL_WORLD_SIZE` of torchrun; all ranks where it says nothing that can be right."""
    size = world_size
    with suppress(ConfigError):
        size = local_world_size() or world_size
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
        """Collective where there are several nodes: to be called on all ranks alike."""
        ranks = node_ranks(rank, world_size)
        if len(ranks) == world_size:
            return cls(ranks=ranks)
        nodes = [range(first, first + len(ranks)) for first in range(0, world_size, len(ranks))]
        groups = [dist.new_group(list(node)) for node in nodes]
        return cls(ranks=ranks, group=groups[rank // len(ranks)])

    def converter(self, name: str, receivers: Iterable[Sequence[int]]) -> int | None:
        """The rank of this node that reads and converts what the tensor `name`, and others with it, are made of.

        Ranks take turns. None if no rank here receives any of it; if one alone does, that one.
        """
        found = sorted({rank for ranks in receivers for rank in ranks})
        return found[sum(name.encode()) % len(found)] if found else None
