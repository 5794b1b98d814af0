"""Filling a model: its weights are read ahead while it takes its shape, then quantized, exchanged, and put into it.

Quantizing at the same time takes longer: of threads that each call one small operation of torch after the other, each
waits for the others' after every one. Side by side on two GPUs, 8B was ready in 2.1 s instead of 2.5.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.adapters.deferred import DeferredValues, Drawing
from surgery.checkpoint import Checkpoint, Prefetch, Reader
from surgery.comm.background import Background, Staging, in_background
from surgery.comm.device_to_host import HostCopies
from surgery.comm.nodes import Node
from surgery.comm.ranks import Ranks
from surgery.passes.base import Batch, Naming
from surgery.passes.buffers import ShardBuffers
from surgery.passes.exchange import Exchange
from surgery.passes.install import install, install_initials
from surgery.passes.pipeline import Pipeline
from surgery.passes.read import Load, requests
from surgery.passes.record import Remember
from surgery.passes.relocate import Place
from surgery.passes.replace import Replace
from surgery.sharding import fsdp2
from surgery.telemetry.report import Report

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Filling", "Meeting", "Source", "filling"]


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What all ranks have set up together. rng_state: rank 0's, from which all draw the adapters' initial values."""

    ranks: Ranks
    node: Node
    mesh: DeviceMesh | None
    rng_state: torch.Tensor = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be loaded, in which order, and how far ahead it is read."""

    checkpoint: Checkpoint
    layers: list[Batch] = field(repr=False)
    staging: Staging


@dataclass(kw_only=True, eq=False)
class Filling:
    """What is made for a model in other threads, until it is put into the model. load: fills the parts."""

    parts: ShardBuffers
    meeting: Meeting
    report: Report
    stop: threading.Event
    reader: Reader
    landing: HostCopies
    stack: contextlib.ExitStack = field(repr=False)
    load: Callable[[], object] = field(repr=False)
    _drawings: list[tuple[Drawing, Background]] = field(default_factory=list, init=False)

    def draw(self, initials: DeferredValues, *, rows: Callable[[int], range], device: torch.device) -> None:
        """Begin to draw the values of adapters that are on meta; `rows` and `device` as `Drawing` takes them."""
        drawing = Drawing(initials=initials, rng_state=self.meeting.rng_state, rows=rows, device=device, stop=self.stop)
        self._drawings.append((drawing, self._in_background(drawing.run)))

    def into(self, model: nn.Module) -> None:
        """Load it, and put it into `model`, as it is by now. Raises `CheckpointError` if a file has changed since."""
        self._in_background(self.load).wait()
        self.reader.check_unchanged()
        self.landing.wait()
        with self.report.phase("install"), Naming("install", "the model"):
            install(model, self.parts)
            for drawing, background in self._drawings:
                background.wait()
                install_initials(drawing)
                drawing.go_on()

    def _in_background(self, work: Callable[[], object]) -> Background:
        device = self.parts.residence.compute_device
        return self.stack.enter_context(in_background(work, stop=self.stop, device=device))


@contextlib.contextmanager
def filling(
    model: nn.Module, source: Source, parts: ShardBuffers, meeting: Meeting, report: Report
) -> Iterator[Filling]:
    """Load all parts of `model`, which is on meta.

    The block may wrap, adapt and shard it, without a collective, while its first weights are read. At its end nothing
    is read or drawn any more, whatever happened.
    """
    stop = threading.Event()
    parts.reserve(target for layer in source.layers for target in layer.targets)
    with contextlib.ExitStack() as stack:
        landing = stack.enter_context(HostCopies(parts.residence.compute_device))
        reader = stack.enter_context(source.checkpoint.reader(on_read=report.count_bytes))
        passes = _passes(source, reader, parts, meeting, stop=stop, landing=landing, stack=stack)
        pipeline = Pipeline(
            passes=passes,
            given=Replace.ensures,
            layers=lambda _: source.layers,
            report=report,
            between=meeting.ranks.check_alarm,
        )
        fill = Filling(
            parts=parts,
            meeting=meeting,
            report=report,
            stop=stop,
            reader=reader,
            landing=landing,
            stack=stack,
            load=lambda: pipeline.run(model),
        )
        yield fill


def _passes(
    source: Source,
    reader: Reader,
    parts: ShardBuffers,
    meeting: Meeting,
    *,
    stop: threading.Event,
    landing: HostCopies,
    stack: contextlib.ExitStack,
) -> tuple[Load, Exchange, Remember, Place]:
    prefetch = stack.enter_context(
        Prefetch(
            reader,
            requests(source.layers, parts.division, parts.rank),
            chunk_elements=source.staging.elements,
            buffers=source.staging.buffers,
            threads=source.staging.threads,
            pin=parts.residence.compute_device.type == "cuda",
        )
    )
    replicas = fsdp2.replicas_of(meeting.mesh) if meeting.mesh is not None else None
    return (
        Load(index=source.checkpoint.index, reader=reader, prefetch=prefetch, parts=parts, node=meeting.node),
        Exchange(parts=parts, ranks=meeting.ranks, node=meeting.node, stop=stop, replicas=replicas),
        Remember(parts=parts),
        Place(parts=parts, ranks=meeting.ranks, landing=landing),
    )
