"""Pass `quantize`: the pieces of a batch into its shard buffers, quantized if that is what a tensor is."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import ConfigError
from surgery.passes.base import Batch, BatchPass, Naming
from surgery.passes.loading import Loading
from surgery.passes.tensors import ShardBuffer

__all__ = ["Quantize"]


@dataclass(frozen=True, kw_only=True)
class Quantize(BatchPass):
    """Fill the shard buffers of a batch with the pieces that were read; watchers see each before and after."""

    name = "quantize"

    loading: Loading

    def run_batch(self, batch: Batch) -> None:
        """Take the pieces of `batch`."""
        if not batch.buffers:
            raise ConfigError("nothing was read: quantize comes after read")
        for buffer in batch.buffers:
            if buffer.target.segments:
                with Naming(self.name, buffer.target.fqn):
                    self.take(buffer)
        self.loading.raise_failure()

    def take(self, buffer: ShardBuffer) -> None:
        """Quantize or copy the pieces of `buffer` in order."""
        for start, values in buffer.pieces:
            if buffer.target.stored is None:
                self.loading.show(buffer.target, lambda watcher: watcher.see_values(buffer.target, start, values))  # noqa: B023  # called at once
            self.loading.buffers.fill(buffer, start, values)
        buffer.pieces = ()
        self.loading.show(buffer.target, lambda watcher: watcher.see_tensor(buffer))
