"""Pass `exchange`: what one rank has and others need: parts of converted tensors, statistics, replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch

from surgery.comm.collectives import all_gather_flat, gather_parts, scatter_parts
from surgery.comm.failures import collective
from surgery.errors import ConfigError
from surgery.passes.base import Batch, BatchPass, Naming
from surgery.passes.loading import Loading
from surgery.passes.quantize import Quantize
from surgery.passes.tensors import ShardBuffer
from surgery.quantizers.base import QuantFormat
from surgery.sharding.partition import chunk

__all__ = ["Exchange"]


@dataclass(frozen=True, kw_only=True)
class Exchange(BatchPass):
    """Complete every shard buffer of a batch, and make the state of every quantized weight.

    Collective. All ranks wait for each other before a batch, so that one that has failed leaves none in a collective.
    They load another one first: ranks are never equally fast.
    """

    name = "exchange"

    loading: Loading
    quantize: Quantize

    def run_batch(self, batch: Batch) -> None:
        """Complete the buffers of `batch`, at which this rank has arrived."""
        self.loading.ranks.pass_gate(str(batch.number), stop=self.loading.stop)
        with collective(self.loading.ranks), Naming(self.name, batch.fqn):
            self._complete(batch)

    def _complete(self, batch: Batch) -> None:
        read = [buffer for buffer in batch.buffers if buffer.target.statistics_of is None]
        for _, group in groupby(read, lambda buffer: buffer.target.assignment):
            buffers = list(group)
            if not buffers[0].target.segments:
                self._hand_out(buffers)
        if any(buffer.pieces or not buffer.is_full for buffer in read):
            raise ConfigError("a tensor of this batch is not complete on this rank: exchange comes after quantize")
        self._make_states([buffer for buffer in read if buffer.target.is_quantized])
        self._cut_statistics(batch.buffers)
        for buffer in batch.buffers:
            self._gather_replicas(buffer)

    def _hand_out(self, buffers: Sequence[ShardBuffer]) -> None:
        """Give each rank of the node its elements of tensors that one of them has converted."""
        converter = self.loading.converter([buffer.target for buffer in buffers])
        for buffer in buffers:
            if self.loading.receivers(buffer.target) in ([], [converter]):
                values = buffer.converted
            else:
                assert converter is not None
                values = self._scatter(buffer, converter)
            buffer.converted = None
            if values is not None and buffer.slice.elements:
                buffer.pieces = ((buffer.slice.elements.start, values),)
                self.quantize.take(buffer)

    def _scatter(self, buffer: ShardBuffer, converter: int) -> torch.Tensor:
        node, shares = self.loading.job.node, self.loading.buffers.partition.slices(buffer.target.form)
        return scatter_parts(
            buffer.converted,
            [shares[rank].elements for rank in node.ranks],
            node.ranks.index(self.loading.ranks.rank),
            like=torch.empty(0, dtype=buffer.target.read_as, device=self.loading.device),
            source=converter,
            group=node.group,
        )

    def _make_states(self, quantized: Sequence[ShardBuffer]) -> None:
        statistics = self._statistics(quantized)
        for buffer in quantized:
            buffer.statistics = None
        known = list(zip(quantized, statistics, strict=True))
        with self.loading.keeping_failure(self.name, quantized[0].target.module_fqn if quantized else ""):
            for quant, group in groupby(known, lambda each: each[0].target.quant):
                assert quant is not None
                buffers, found = zip(*group, strict=True)
                for buffer, state in zip(buffers, self._states(quant, buffers, found), strict=True):
                    buffer.state = state

    def _states(
        self, quant: QuantFormat, quantized: Sequence[ShardBuffer], statistics: Sequence[torch.Tensor]
    ) -> list[Any]:
        read, targets = self.loading.reader.read, [buffer.target for buffer in quantized]
        stored = [target.stored for target in targets if target.stored is not None]
        if stored:
            return [quant.stored_state(each, found, read) for each, found in zip(stored, statistics, strict=True)]
        shapes = [target.logical for target in targets if target.logical is not None]
        return quant.states(statistics, shapes, [target.precision for target in targets])

    def _cut_statistics(self, buffers: Sequence[ShardBuffer]) -> None:
        """Give statistics that are parameters this rank's rows of them, and let go of the whole."""
        weights = {buffer.target.fqn: buffer for buffer in buffers if buffer.target.is_quantized}
        for buffer in buffers:
            if buffer.target.statistics_of is None or self.loading.failure is not None:
                continue
            weight, rows = weights[buffer.target.statistics_of], buffer.slice.reads
            assert weight.target.quant is not None
            module, leaf = weight.target.places[0]
            weight.whole_state = weight.state
            whole, weight.state = weight.target.quant.split_state(module, leaf, weight.state)
            values = whole.view(buffer.target.dtype)[rows.start : rows.stop]
            self.loading.buffers.fill(buffer, rows.start, values)

    def _statistics(self, quantized: Sequence[ShardBuffer]) -> list[torch.Tensor]:
        """The statistics of all blocks of each weight, float32 or as the checkpoint has them, in order."""
        mine = [buffer.statistics for buffer in quantized if buffer.statistics is not None]
        world_size, partition = self.loading.ranks.world_size, self.loading.buffers.partition
        if world_size == 1 or not mine:
            return mine
        blocks = [[share.blocks for share in partition.slices(buffer.target.form)] for buffer in quantized]
        ends = [[0, *accumulate(len(of[rank]) for of in blocks)] for rank in range(world_size)]
        rows = all_gather_flat(torch.cat(mine), [last for *_, last in ends])
        # Of each rank a part for every weight, and what its row is longer than that.
        found = [
            torch.split(row, [*(len(of[rank]) for of in blocks), row.numel() - ends[rank][-1]])
            for rank, row in enumerate(rows.unbind())
        ]
        return [torch.cat([found[rank][number] for rank in _in_order(of)]) for number, of in enumerate(blocks)]

    def _gather_replicas(self, buffer: ShardBuffer) -> None:
        """Fill the rows that this rank keeps and others have read."""
        grid = self.loading.buffers.partition.grid_of(buffer.target.form)
        if grid.replicas == 1:
            return
        rows = range(len(buffer.slice.keeps))
        gather_parts(
            buffer.data,
            [_scaled(chunk(rows, grid.replicas, replica), buffer.row) for replica in range(grid.replicas)],
            self.loading.ranks.rank // grid.shards,
            group=self.loading.setting.strategy.replicas if grid.shards > 1 else None,
        )


def _in_order(blocks: Sequence[range]) -> list[int]:
    """The ranks that have blocks, first blocks first."""
    return sorted((rank for rank, of in enumerate(blocks) if of), key=lambda rank: blocks[rank].start)


def _scaled(rows: range, row: int) -> range:
    return range(rows.start * row, rows.stop * row)
