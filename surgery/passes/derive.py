"""Pass `derive`: values of adapters that are made of base weights, of the parts that ranks have of those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery.adapters.derived import Derived, find_derived, put
from surgery.comm.collectives import add_up
from surgery.comm.failures import collective
from surgery.passes.base import Batch, BatchPass, Naming, Pass
from surgery.passes.loading import Loading
from surgery.passes.tensors import ShardBuffer

__all__ = ["Await", "Derive", "run_elements"]

#: Elements of a weight that are looked at together, about; on a CPU what its caches hold.
RUN_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}


def run_elements(device: torch.device) -> int:
    """The number of elements to look at together on `device`."""
    return RUN_ELEMENTS.get(device.type, RUN_ELEMENTS["cuda"])


@dataclass(frozen=True, kw_only=True)
class Await(Pass):
    """Note what adapters wait for, before they are sharded."""

    name = "adapt"

    loading: Loading

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, unchanged."""
        for each in find_derived(model):
            self.loading.derived.setdefault(each.base, []).append(each)
        return model


@dataclass(frozen=True, kw_only=True)
class Derive(BatchPass):
    """Fill in magnitudes of DoRA and rows of embeddings.

    Each rank looks at what it has made of a weight, and no other: the bytes that forward will dequantize. Collective
    where a batch has such a weight; before buffers are moved.
    """

    name = "derive"

    loading: Loading

    def run_batch(self, batch: Batch) -> None:
        """Derive what is made of the tensors of `batch`."""
        wanted = [(buffer, each) for buffer in batch.buffers for each in self._wanted(buffer)]
        if wanted:
            self._derive(batch, wanted)
        for buffer in batch.buffers:
            buffer.whole_state = None

    def _derive(self, batch: Batch, wanted: Sequence[tuple[ShardBuffer, Derived]]) -> None:
        with collective(self.loading.ranks), Naming(self.name, batch.fqn):
            found = [self._find(buffer, each) for buffer, each in wanted]
            add_up(found)
            for (buffer, each), sums in zip(wanted, found, strict=True):
                value = each.value(sums, self._dtype(buffer))
                for place in each.places:
                    put(place, value)

    def _wanted(self, buffer: ShardBuffer) -> Iterator[Derived]:
        for module, leaf in buffer.target.places:
            if leaf == "weight":
                yield from self.loading.derived.get(module, ())

    def _find(self, buffer: ShardBuffer, each: Derived) -> torch.Tensor:
        found = each.empty(_shape(buffer), buffer.target.dtype, self.loading.device)
        # Others count on this rank.
        with self.loading.keeping_failure(self.name, buffer.target.module_fqn):
            if self.loading.failure is None:
                for start, values in self._values(buffer):
                    each.look(found, values, start, _shape(buffer))
        return found

    def _values(self, buffer: ShardBuffer) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(start, values)`: what this rank alone has made, from flat element `start` on, run by run."""
        form, quant = buffer.target.form, buffer.target.quant
        rows, step = buffer.slice.reads, max(run_elements(self.loading.device) // form.row, 1)
        made = buffer.read_rows()
        for first in range(0, len(rows), step):
            run = made[first * buffer.row : (first + step) * buffer.row]
            elements = form.elements(rows[first : first + step])
            if quant is not None:
                run = quant.dequantize(run.view(torch.uint8), elements.start, buffer.whole_state or buffer.state)
            yield elements.start, run[: len(elements)]

    def _dtype(self, buffer: ShardBuffer) -> torch.dtype:
        """The dtype in which PEFT computes with this weight: wider where adapters are, which take that of storage."""
        target, quant = buffer.target, buffer.target.quant
        if quant is None:
            return target.dtype
        values = getattr(buffer.state, "dtype", None) or target.precision or quant.dtype
        adapters = target.dtype if target.dtype.is_floating_point else torch.float32
        return torch.promote_types(values, adapters)


def _shape(buffer: ShardBuffer) -> torch.Size:
    return buffer.target.logical or buffer.target.shape
