"""Read this rank's part of a layer from the checkpoint, and quantize it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import torch

from surgery.checkpoint import Chunk, Index, Prefetch, Reader, Request
from surgery.comm.nodes import Node
from surgery.errors import WeightsMismatchError
from surgery.model.fqn import split
from surgery.model.weights import Assignment
from surgery.passes.base import Batch, Naming, Pass
from surgery.passes.buffers import ShardBuffer, ShardBuffers
from surgery.passes.targets import Target
from surgery.sharding.partition import Partition

__all__ = ["Load", "requests"]


def requests(layers: Iterable[Batch], division: Partition, rank: int) -> Iterator[Request]:
    """The ranges that `rank` reads of the tensors that map to one target each, in the order in which it uses them."""
    for layer in layers:
        for target in layer.targets:
            elements = division.slice(target.form, rank).elements
            if target.source is not None and elements:
                yield Request(entry=target.source, start=elements.start, stop=elements.stop)


@dataclass(frozen=True, kw_only=True)
class Load(Pass):
    """After: of every target the part that this rank reads, quantized if that is what the target is.

    A tensor that upstream's conversion merges or splits, or that the checkpoint holds transposed, is no range of a
    file: one rank of each node reads and converts it, and the next pass hands out its parts.
    """

    name: ClassVar[str] = "load"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized-modules"})
    ensures: ClassVar[frozenset[str]] = frozenset({"parts"})

    index: Index = field(repr=False)
    reader: Reader = field(repr=False)
    prefetch: Prefetch = field(repr=False)
    parts: ShardBuffers
    node: Node

    def run_batch(self, layer: Batch) -> None:
        """Fill the parts of `layer`."""
        for assignment, group in groupby(layer.targets, lambda target: target.assignment):
            targets = list(group)
            with Naming(self.name, split(targets[0].fqn)[0]):
                self._fill(targets, assignment)

    def _fill(self, targets: list[Target], assignment: Assignment) -> None:
        parts = [self.parts.begin(target) for target in targets]
        if targets[0].source is not None:
            self._stream(parts[0])
        elif self.node.converter(targets, self.parts.division) == self.parts.rank:
            self._convert(parts, assignment)

    def _stream(self, part: ShardBuffer) -> None:
        position = part.slice.elements.start
        while position < part.slice.elements.stop:
            chunk = self.prefetch.next()
            for duplicate in part.target.assignment.duplicates:
                self._check_same(chunk, duplicate, part.target)
            self.parts.fill(part, chunk.start, chunk.data)
            position = chunk.start + chunk.data.numel()
            chunk.release(_recorded(self.parts.residence.compute_device))

    def _convert(self, parts: list[ShardBuffer], assignment: Assignment) -> None:
        tensors = assignment.convert({name: self.reader.read(self.index[name]) for name in assignment.sources})
        for name in assignment.duplicates:
            if not _equal(self.reader.read(self.index[name]), tensors[assignment.targets[0]], parts[0].target):
                raise _differ(name, assignment)
        for part in parts:
            tensor = tensors[part.target.fqn]
            part.converted = (tensor.t() if part.target.is_transposed else tensor).reshape(-1)

    def _check_same(self, chunk: Chunk, name: str, target: Target) -> None:
        """Tensors saved once more under a tied name must say the same: one of them would be lost without a word.

        Samples have said so already (`surgery.model.ties`); what they have missed is found here.
        """
        other = self.reader.read_range(self.index[name], chunk.start, chunk.start + chunk.data.numel())
        if not _equal(other, chunk.data, target):
            raise _differ(name, target.assignment)


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
