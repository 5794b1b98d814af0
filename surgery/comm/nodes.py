"""Which ranks are on this node: what is read once per node is read by one of them for the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from surgery.passes.targets import Target
from surgery.sharding.partition import Partition
from surgery.telemetry.numbers import whole_number

__all__ = ["Node", "node_ranks"]


def node_ranks(rank: int, world_size: int) -> range:
    """The ranks of this node, by `LOCAL_WORLD_SIZE` of torchrun; all ranks where it says nothing that can be right."""
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
        """Collective where there are several nodes: to be called on all ranks alike."""
        ranks = node_ranks(rank, world_size)
        if len(ranks) == world_size:
            return cls(ranks=ranks)
        nodes = [range(first, first + len(ranks)) for first in range(0, world_size, len(ranks))]
        groups = [dist.new_group(list(node)) for node in nodes]
        return cls(ranks=ranks, group=groups[rank // len(ranks)])

    def receivers(self, target: Target, division: Partition) -> list[int]:
        """The ranks of this node that get elements of `target`."""
        slices = division.slices(target.form)
        return [rank for rank in self.ranks if slices[rank].elements]

    def converter(self, targets: Sequence[Target], division: Partition) -> int | None:
        """The rank of this node that reads and converts what fills `targets`, all of one assignment; they take turns.

        None if no rank here gets any of it; if one alone does, that one.
        """
        receivers = sorted({rank for target in targets for rank in self.receivers(target, division)})
        return receivers[sum(targets[0].fqn.encode()) % len(receivers)] if receivers else None
