"""Read this rank's part of a layer from the checkpoint, and quantize it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import torch

from surgery.checkpoint import Index, Prefetch, Reader, Request
from surgery.distributed.nodes import Node
from surgery.fqn import split
from surgery.parts import Part, Parts
from surgery.passes.base import Layer, Naming, Pass
from surgery.slices import Division
from surgery.targets import Target
from surgery.weights import Assignment

__all__ = ["Load", "requests"]


def requests(layers: Iterable[Layer], division: Division, rank: int) -> Iterator[Request]:
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
    parts: Parts
    node: Node

    def run_layer(self, layer: Layer) -> None:
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

    def _stream(self, part: Part) -> None:
        position = part.slice.elements.start
        while position < part.slice.elements.stop:
            chunk = self.prefetch.next()
            self.parts.fill(part, chunk.start, chunk.data)
            position = chunk.start + chunk.data.numel()
            chunk.release(_recorded(self.parts.residence.compute_device))

    def _convert(self, parts: list[Part], assignment: Assignment) -> None:
        tensors = assignment.convert({name: self.reader.read(self.index[name]) for name in assignment.sources})
        for part in parts:
            tensor = tensors[part.target.fqn]
            part.converted = (tensor.t() if part.target.is_transposed else tensor).reshape(-1)


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all copies that were asked for so far; None where copies are done when they return."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # no annotation upstream
    event.record()
    return event
