"""Move parts to where they wait until the model takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from surgery.comm.collectives import gather_to_rank0
from surgery.comm.device_to_host import HostCopies
from surgery.comm.failures import collective
from surgery.comm.ranks import Ranks
from surgery.passes.base import Batch, Naming, Pass
from surgery.passes.buffers import ShardBuffer, ShardBuffers

__all__ = ["Place"]


@dataclass(frozen=True, kw_only=True)
class Place(Pass):
    """After: every part is on the rank's data device. `quant_state` and buffers stay on the compute device.

    Collective where rank 0 keeps everything: the others send it what they have quantized, and keep shapes on meta. Rank
    0 copies a layer to its CPU while the next one is made; what it has last must be waited for (`landing`).
    """

    name: ClassVar[str] = "place"
    requires: ClassVar[frozenset[str]] = frozenset({"full-parts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"placed"})

    parts: ShardBuffers
    ranks: Ranks
    landing: HostCopies = field(repr=False)

    def run_batch(self, layer: Batch) -> None:
        """Move the parts of `layer`."""
        self.landing.wait()
        with collective(self.ranks), Naming(self.name, layer.fqn):
            for part in self.parts.of(layer.targets):
                self._move(part)

    def _move(self, part: ShardBuffer) -> None:
        if part.target.form.is_buffer:
            return
        if self.parts.division.rank0_only:
            self._send_to_rank0(part)
        elif part.data.device != self.parts.residence.data_device:
            part.data = part.data.to(self.parts.residence.data_device)

    def _send_to_rank0(self, part: ShardBuffer) -> None:
        numel = part.target.shape.numel()
        keeps = self.parts.residence.keeps_data
        if part.target.is_quantized:
            whole = torch.empty(numel, dtype=part.target.dtype) if keeps else None
            rows = [share.reads for share in self.parts.division.slices(part.target.form)]
            gather_to_rank0(
                part.read_rows(), rows, out=whole, landing=self.landing
            )  # a row of a packed weight is one element
        else:
            whole = part.data if keeps else None
        part.data = torch.empty(numel, dtype=part.target.dtype, device="meta") if whole is None else whole
        part.is_whole = True
