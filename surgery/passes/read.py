"""Pass `read`: this rank's part of a batch, from the checkpoint; quantized or copied as it arrives, by `quantize`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from surgery.checkpoint import Chunk, Request
from surgery.errors import WeightsMismatchError
from surgery.model.keys import Assignment
from surgery.passes.base import Batch, BatchPass, Naming, Pass
from surgery.passes.loading import CHUNK_ELEMENTS, Loading, wanted
from surgery.passes.tensors import ShardBuffer, Target
from surgery.sharding.partition import common

__all__ = ["Read", "ReadAhead"]


@dataclass(frozen=True, kw_only=True)
class ReadAhead(Pass):
    """Begin to read, in threads, what the model has on meta; passes that shape it go on meanwhile."""

    name = "read-ahead"

    loading: Loading

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, unchanged."""
        self.loading.read_ahead(model)
        return model


@dataclass(frozen=True, kw_only=True)
class Read(BatchPass):
    """Give every tensor of a batch its shard buffer, with the pieces that are read for it, yet to be taken.

    A tensor that upstream's conversion splits or permutes, or that the checkpoint holds transposed, is no range of a
    file, nor whole tensors one behind the other: one rank of each node reads and converts it, and `exchange` hands out
    its parts.
    """

    name = "read"

    loading: Loading

    def run_batch(self, batch: Batch) -> None:
        """Give `batch` its buffers."""
        for assignment, group in groupby(batch.targets, lambda target: target.assignment):
            targets = list(group)
            with Naming(self.name, targets[0].module_fqn):
                batch.buffers += self._buffers(targets, assignment)

    def _buffers(self, targets: list[Target], assignment: Assignment) -> list[ShardBuffer]:
        found = [self.loading.buffers.begin(target) for target in targets]
        if targets[0].segments:
            for buffer in [each for each in found if each.target.segments]:
                buffer.pieces = self._stream(buffer, wanted(buffer.target, buffer.slice))
        elif self.loading.converter(targets) == self.loading.ranks.rank:
            self._convert([buffer for buffer in found if buffer.target.statistics_of is None], assignment)
        return found

    def _stream(self, buffer: ShardBuffer, requests: Iterable[Request]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(start, values)` of what the rank reads of one tensor; each is valid until the next is asked for."""
        for request in requests:
            yield from self._chunks(buffer, request)

    def _chunks(self, buffer: ShardBuffer, request: Request) -> Iterator[tuple[int, torch.Tensor]]:
        assert self.loading.prefetch is not None
        position = request.start
        while position < request.stop:
            # Named here, since `quantize` asks for the pieces.
            with Naming(self.name, buffer.target.module_fqn):
                chunk = self.loading.prefetch.next()
                for duplicate in buffer.target.assignment.duplicates:
                    self._check_same(chunk, duplicate, buffer.target)
            yield _within(chunk, buffer) if request.unit > 1 else (chunk.start, chunk.data)
            position = chunk.start + chunk.data.numel()
            chunk.release(_recorded(self.loading.device))

    def _convert(self, buffers: list[ShardBuffer], assignment: Assignment) -> None:
        tensors = assignment.convert({name: self._read(name) for name in assignment.sources})
        for name in assignment.duplicates:
            if not _equal(self._read(name), tensors[assignment.targets[0]], buffers[0].target):
                raise _differ(name, assignment)
        for buffer in buffers:
            tensor = tensors[buffer.target.fqn]
            buffer.converted = (tensor.t() if buffer.target.is_transposed else tensor).reshape(-1)

    def _read(self, name: str) -> torch.Tensor:
        """A whole tensor of the checkpoint, dequantized if it is packed."""
        checkpoint, reader = self.loading.checkpoint, self.loading.reader
        if name not in checkpoint.packed:
            return reader.read(checkpoint.index[name])
        weight = checkpoint.packed[name]
        # Some 30 bytes of temporaries an element.
        size, out = CHUNK_ELEMENTS["cpu"], torch.empty(weight.settings.shape, dtype=weight.settings.dtype, device="cpu")
        for start in range(0, out.numel(), size):
            stop = min(start + size, out.numel())
            out.view(-1)[start:stop] = weight.dequantize(reader.read_range, start, stop)
        return out

    def _check_same(self, chunk: Chunk, name: str, target: Target) -> None:
        """Compare a tensor that is saved once more under a tied name: one of two would be lost without a word.

        Samples have been compared already (`surgery.model.weights`); what they have missed is found here.
        """
        entry = self.loading.checkpoint.index[name]
        other = self.loading.reader.read_range(entry, chunk.start, chunk.start + chunk.data.numel())
        if not _equal(other, chunk.data, target):
            raise _differ(name, target.assignment)


def _within(chunk: Chunk, buffer: ShardBuffer) -> tuple[int, torch.Tensor]:
    """`(start, values)`: those of `chunk`, of whole matrices, that the rank needs."""
    start = chunk.start
    needed = common(range(start, start + chunk.data.numel()), buffer.slice.elements)
    return needed.start, chunk.data[needed.start - start : needed.stop - start]


def _equal(one: torch.Tensor, other: torch.Tensor, target: Target) -> bool:
    return torch.equal(one.to(target.dtype), other.to(target.dtype))


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all copies that were asked for so far; None where copies are done when they return."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # no annotation upstream
    event.record()
    return event


def _differ(name: str, assignment: Assignment) -> WeightsMismatchError:
    return WeightsMismatchError(
        f"{name} and {assignment.sources[0]} differ in the checkpoint, but the model ties them "
        f"({assignment.targets[0]}): set tie_word_embeddings to false in config.json if they are two",
        tensor=name,
    )
