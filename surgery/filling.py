"""Filling a model: its weights are read, quantized and exchanged in one thread while it takes shape in another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.checkpoint import Checkpoint, Prefetch
from surgery.distributed import fsdp2
from surgery.distributed.exchange import Ranks
from surgery.distributed.nodes import Node
from surgery.install import install
from surgery.landing import Landing
from surgery.loading import Staging, in_background
from surgery.parts import Parts
from surgery.passes.base import Layer, Naming
from surgery.passes.exchange import Exchange
from surgery.passes.load import Load, requests
from surgery.passes.pipeline import Pipeline
from surgery.passes.place import Place
from surgery.passes.remember import Remember
from surgery.passes.replace import Replace
from surgery.report import Report

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Meeting", "Source", "filling"]


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
    layers: list[Layer] = field(repr=False)
    staging: Staging


@contextlib.contextmanager
def filling(
    model: nn.Module, source: Source, parts: Parts, meeting: Meeting, report: Report
) -> Iterator[Callable[[nn.Module], None]]:
    """Load all parts of `model`, which is on meta, while the block runs.

    The block may wrap, adapt and shard it meanwhile, without a collective. What it is given waits for the weights and
    puts them into the model, as it is by then. At the end of the block nothing is read any more, whatever happened.
    """
    stop = threading.Event()
    parts.reserve(target for layer in source.layers for target in layer.targets)
    with contextlib.ExitStack() as stack:
        landing = stack.enter_context(Landing(parts.residence.compute_device))
        passes = _passes(source, parts, meeting, stop=stop, landing=landing, stack=stack, report=report)
        pipeline = Pipeline(
            passes=passes,
            given=Replace.ensures,
            layers=lambda _: source.layers,
            report=report,
            between=meeting.ranks.check_alarm,
        )
        loading = stack.enter_context(
            in_background(lambda: pipeline.run(model), stop=stop, device=parts.residence.compute_device)
        )

        def fill(shaped: nn.Module) -> None:
            loading.wait()
            landing.wait()
            with report.phase("install"), Naming("install", "the model"):
                install(shaped, parts)

        yield fill


def _passes(
    source: Source,
    parts: Parts,
    meeting: Meeting,
    *,
    stop: threading.Event,
    landing: Landing,
    stack: contextlib.ExitStack,
    report: Report,
) -> tuple[Load, Exchange, Remember, Place]:
    reader = stack.enter_context(source.checkpoint.reader(on_read=report.count_bytes))
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
