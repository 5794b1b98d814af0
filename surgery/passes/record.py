"""Remember what was quantized, so that it can be attested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.passes.base import Batch, Pass
from surgery.passes.buffers import ShardBuffers
from surgery.quantizers.record import record

__all__ = ["Remember"]


@dataclass(frozen=True, kw_only=True)
class Remember(Pass):
    """After: of every 4-bit layer there is a digest of what this rank has made of it, and of its state.

    Before parts are moved, so that all that can happen to them is attested. A digest takes a hundredth of the time that
    quantizing takes.
    """

    name: ClassVar[str] = "remember"
    requires: ClassVar[frozenset[str]] = frozenset({"full-parts"})
    ensures: ClassVar[frozenset[str]] = frozenset()

    parts: ShardBuffers

    def run_batch(self, layer: Batch) -> None:
        """Remember the quantized parts of `layer`."""
        record(self.parts.of(layer.targets))
