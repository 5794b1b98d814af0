"""Send each other what one rank has and others need: parts of converted tensors, statistics, replicas."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import ClassVar

import torch
import torch.distributed as dist

from surgery.comm.collectives import all_gather_flat, gather_parts, scatter_parts
from surgery.comm.failures import collective
from surgery.comm.nodes import Node
from surgery.comm.ranks import Ranks
from surgery.passes.base import Batch, Naming, Pass
from surgery.passes.buffers import ShardBuffer, ShardBuffers
from surgery.passes.targets import Target
from surgery.sharding.partition import chunk

__all__ = ["Exchange"]


@dataclass(frozen=True, kw_only=True)
class Exchange(Pass):
    """After: every part is full, and every quantized one has the state of the whole weight.

    Collective. All ranks wait for each other before a layer, so that one that has failed leaves none in a collective.
    They load another one first: ranks are never equally fast.

    stop: set when this rank has failed elsewhere. replicas: the group of the ranks that keep the same shards, None
    where that is all ranks or this one alone.
    """

    name: ClassVar[str] = "exchange"
    requires: ClassVar[frozenset[str]] = frozenset({"parts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"full-parts"})

    parts: ShardBuffers
    ranks: Ranks
    node: Node
    stop: threading.Event = field(repr=False)
    replicas: dist.ProcessGroup | None = field(default=None, repr=False)

    def arrive(self, layer: Batch) -> None:
        """Tell the other ranks that this one has its parts of `layer`."""
        self.ranks.arrive(str(layer.number), stop=self.stop)

    def run_batch(self, layer: Batch) -> None:
        """Complete the parts of `layer`, at which this rank has arrived."""
        self.ranks.pass_gate(str(layer.number), stop=self.stop)
        with collective(self.ranks), Naming(self.name, layer.fqn):
            self._complete(layer)

    def _complete(self, layer: Batch) -> None:
        for _, group in groupby(layer.targets, lambda target: target.assignment):
            targets = list(group)
            if targets[0].source is None:
                self._hand_out(targets)
        parts = self.parts.of(layer.targets)
        self._make_states([part for part in parts if part.target.is_quantized])
        for part in parts:
            self._gather_replicas(part)

    def _make_states(self, quantized: Sequence[ShardBuffer]) -> None:
        statistics = self._statistics(quantized)
        for part in quantized:
            part.statistics = None
        shapes = [part.target.logical for part in quantized if part.target.logical is not None]
        precisions = [part.target.precision for part in quantized]
        states = self.parts.quantizer.states(statistics, shapes, *([precisions] if any(precisions) else ()))
        for part, state in zip(quantized, states, strict=True):
            part.state = state

    def _hand_out(self, targets: Sequence[Target]) -> None:
        """Give each rank of the node its elements of tensors that one of them has converted."""
        converter = self.node.converter(targets, self.parts.division)
        for part in self.parts.of(targets):
            receivers = self.node.receivers(part.target, self.parts.division)
            if receivers in ([], [converter]):
                values = part.converted
            else:
                assert converter is not None
                values = self._scatter(part, converter)
            part.converted = None
            if values is not None and part.slice.elements:
                self.parts.fill(part, part.slice.elements.start, values)

    def _scatter(self, part: ShardBuffer, converter: int) -> torch.Tensor:
        slices = self.parts.division.slices(part.target.form)
        return scatter_parts(
            part.converted,
            [slices[rank].elements for rank in self.node.ranks],
            self.node.ranks.index(self.parts.rank),
            like=torch.empty(0, dtype=part.target.read_as, device=self.parts.residence.compute_device),
            source=converter,
            group=self.node.group,
        )

    def _statistics(self, parts: Sequence[ShardBuffer]) -> list[torch.Tensor]:
        """The statistics of all blocks of each of `parts`, float32, in order."""
        mine = [part.statistics for part in parts if part.statistics is not None]
        if self.ranks.world_size == 1 or not mine:
            return mine
        blocks = [[share.blocks for share in self.parts.division.slices(part.target.form)] for part in parts]
        ends = [[0, *accumulate(len(of[rank]) for of in blocks)] for rank in range(self.ranks.world_size)]
        rows = all_gather_flat(torch.cat(mine), [last for *_, last in ends])
        # Of each rank a part for every weight, and what its row is longer than that.
        found = [
            torch.split(row, [*(len(of[rank]) for of in blocks), row.numel() - ends[rank][-1]])
            for rank, row in enumerate(rows.unbind())
        ]
        return [torch.cat([found[rank][number] for rank in _in_order(of)]) for number, of in enumerate(blocks)]

    def _gather_replicas(self, part: ShardBuffer) -> None:
        """Fill the rows that this rank keeps and others have read."""
        grid = self.parts.division.grid_of(part.target.form)
        if grid.replicas == 1:
            return
        rows = range(len(part.slice.keeps))
        gather_parts(
            part.data,
            [_scaled(chunk(rows, grid.replicas, replica), part.row) for replica in range(grid.replicas)],
            self.parts.rank // grid.shards,
            group=self.replicas if grid.shards > 1 else None,
        )


def _in_order(blocks: Sequence[range]) -> list[int]:
    """The ranks that have blocks, first blocks first."""
    return sorted((rank for rank, of in enumerate(blocks) if of), key=lambda rank: blocks[rank].start)


def _scaled(rows: range, row: int) -> range:
    return range(rows.start * row, rows.stop * row)
