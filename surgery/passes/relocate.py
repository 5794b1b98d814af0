"""Pass `relocate`: shard buffers to where they wait until the model takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.comm.collectives import gather_to
from surgery.comm.failures import collective
from surgery.errors import ConfigError
from surgery.passes.base import Batch, BatchPass, Naming
from surgery.passes.loading import Loading
from surgery.passes.tensors import ShardBuffer

__all__ = ["Relocate"]


@dataclass(frozen=True, kw_only=True)
class Relocate(BatchPass):
    """Move the shard buffers of a batch to the rank's data device; states and module buffers stay where it computes.

    Collective where rank 0 keeps everything: the others send it what they have quantized, and keep shapes on meta. Rank
    0 copies a batch to its CPU while the next one is made.
    """

    name = "relocate"

    loading: Loading

    def run_batch(self, batch: Batch) -> None:
        """Move the buffers of `batch`."""
        failed = self.loading.failure is not None  # and others wait for what this rank has
        if not failed and not all(buffer.is_complete for buffer in batch.buffers):
            raise ConfigError("a tensor of this batch is not complete on this rank: relocate comes after exchange")
        self.loading.host_copies.wait()
        with collective(self.loading.ranks), Naming(self.name, batch.fqn):
            for buffer in batch.buffers:
                self._move(buffer)

    def _move(self, buffer: ShardBuffer) -> None:
        if buffer.target.form.is_buffer:
            return
        data_device = self.loading.buffers.devices.data
        if self.loading.buffers.partition.rank0_only:
            self._send_to_rank0(buffer)
        elif buffer.data.device != data_device:
            buffer.data = buffer.data.to(data_device)

    def _send_to_rank0(self, buffer: ShardBuffer) -> None:
        target, keeps = buffer.target, self.loading.buffers.devices.keeps_data
        numel = target.shape.numel()
        if target.is_quantized:
            whole = torch.empty(numel, dtype=target.dtype) if keeps else None
            # A row of a packed weight is one element.
            rows = [share.reads for share in self.loading.buffers.partition.slices(target.form)]
            gather_to(buffer.read_rows(), rows, out=whole, copy=self.loading.host_copies.copy)
        else:
            whole = buffer.data.to(self.loading.buffers.devices.data) if keeps else None
        buffer.data = torch.empty(numel, dtype=target.dtype, device="meta") if whole is None else whole
        buffer.is_whole = True
