"""Pass `record`: digests of what was quantized, so that it can be attested."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import ConfigError
from surgery.passes.base import Batch, BatchPass
from surgery.passes.loading import Loading
from surgery.passes.tensors import ShardBuffer
from surgery.quantizers.digest import Made, Piece, record

__all__ = ["Record"]


@dataclass(frozen=True, kw_only=True)
class Record(BatchPass):
    """Keep a digest of what this rank has made of every quantized layer, and of its state.

    Before buffers are moved, so that all that can happen to them is attested. A digest takes a hundredth of the time
    that quantizing takes.
    """

    name = "record"

    loading: Loading

    def run_batch(self, batch: Batch) -> None:
        """Remember the quantized tensors of `batch`."""
        packed = [buffer for buffer in batch.buffers if buffer.target.is_packed]
        if self.loading.failure is not None:
            return
        if not all(buffer.is_complete for buffer in packed):
            raise ConfigError("a quantized weight has no state yet: record comes after exchange")
        with self.loading.keeping_failure(self.name, batch.fqn):
            record([_made(buffer) for buffer in packed])


def _made(buffer: ShardBuffer) -> Made:
    target = buffer.target
    assert target.quant is not None
    return Made(
        fqn=target.module_fqn if target.places[0][1] == "weight" else target.fqn,
        quant=target.quant,
        places=target.places,
        nbytes=target.nbytes,
        piece=Piece(data=buffer.read_rows(), start=buffer.slice.reads.start * buffer.row * target.dtype.itemsize),
        state=buffer.state,
    )
