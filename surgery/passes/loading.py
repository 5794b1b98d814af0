"""Shared state of the passes of one fill: ranks, shard buffers, the open checkpoint, and threads that end with it.

Weights are read ahead while the model takes its shape, then quantized, exchanged, and put into it. Quantizing at the
same time takes longer: of threads that each call one small operation of torch after the other, each waits for the
others' after every one. Side by side on two GPUs, 8B was ready in 2.1 s instead of 2.5.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from surgery.adapters.deferred import DeferredValues, Drawing
from surgery.adapters.derived import Derived
from surgery.checkpoint import Checkpoint, Prefetch, Reader, Request, Segment
from surgery.comm.background import Background, in_background
from surgery.comm.collectives import HostCopies
from surgery.comm.comparison import same_on_every_rank
from surgery.comm.environment import Node
from surgery.comm.ranks import Ranks
from surgery.errors import ConfigError
from surgery.model.tree import modules_of
from surgery.passes.base import Batch, Naming, Pass, group_into_batches
from surgery.passes.setting import Setting
from surgery.passes.tensors import ShardBuffers, Target
from surgery.sharding.partition import Partition, Slice
from surgery.telemetry.report import Report

__all__ = ["CHUNK_ELEMENTS", "LAYER_LIMIT", "Job", "Loading", "Staging", "cores", "loading", "requests", "wanted"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The ranks that build a model together, and what they have set up. rng_state: rank 0's, for initial values."""

    ranks: Ranks
    node: Node
    rng_state: torch.Tensor = field(repr=False)


@dataclass(kw_only=True, eq=False)
class Loading:
    """The state of one fill, of this rank. batches: what is read, in order, once `read_ahead` was called.

    derived: what adapters wait for, by the module whose weight it is made of.
    watchers: passes of third parties that see values and tensors. failure: the first of theirs, or of the format where
    ranks count on each other, until it is raised where no rank waits for this one. stop: set when the work of its
    threads is not wanted any more.
    """

    checkpoint: Checkpoint
    targets: Sequence[Target]
    setting: Setting
    job: Job
    report: Report
    watchers: Sequence[Pass] = ()
    reader: Reader
    host_copies: HostCopies
    stop: threading.Event
    buffers: ShardBuffers
    prefetch: Prefetch | None = None
    batches: list[Batch] = field(default_factory=list)
    drawings: list[tuple[Drawing, Background]] = field(default_factory=list)
    derived: dict[nn.Module, list[Derived]] = field(default_factory=dict)
    failure: Exception | None = None
    _stack: contextlib.ExitStack = field(repr=False)

    @property
    def ranks(self) -> Ranks:
        """This process among the others."""
        return self.job.ranks

    @property
    def device(self) -> torch.device:
        """The device on which this rank quantizes."""
        return self.buffers.devices.compute

    def read_ahead(self, model: nn.Module) -> None:
        """Begin to read what `model` has by now on meta; its parameters are adapted, cast or sharded meanwhile."""
        strategy = self.setting.strategy
        staging = Staging.on(self.device)
        targets = current_targets(model, self.targets)
        facts = {target.fqn: f"{target.dtype} {tuple(target.shape)}" for target in targets}
        same_on_every_rank(self.ranks, "targets", {"what is to be filled": facts})
        self.batches = group_into_batches(targets, elements=staging.layer_limit(self.ranks.world_size))
        self.buffers.reserve(targets)
        self.prefetch = self._stack.enter_context(
            Prefetch(
                self.reader,
                requests(self.batches, strategy.partition, self.ranks.rank),
                chunk_elements=staging.elements,
                buffers=staging.buffers,
                threads=staging.threads,
                pin=self.device.type == "cuda",
            )
        )

    def draw(self, values: DeferredValues) -> None:
        """Begin to draw the values of adapters that are on meta: what this rank keeps of them."""
        strategy, rank = self.setting.strategy, self.ranks.rank
        drawing = Drawing(
            deferred=values,
            rng_state=self.job.rng_state,
            rows=partial(strategy.adapter_rows, rank),
            device=strategy.adapter_device(rank),
            stop=self.stop,
        )
        self.drawings.append((drawing, self.in_background(drawing.run)))

    def in_background(self, work: Callable[[], object]) -> Background:
        """Run `work` in a thread that ends with the fill."""
        return self._stack.enter_context(in_background(work, stop=self.stop, device=self.device))

    def converter(self, targets: Sequence[Target]) -> int | None:
        """The rank of this node that reads and converts what fills `targets`, all of one assignment."""
        return self.job.node.converter(targets[0].fqn, map(self.receivers, targets))

    def receivers(self, target: Target) -> list[int]:
        """The ranks of this node that are given elements of `target`."""
        shares = self.buffers.partition.slices(target.form)
        return [rank for rank in self.job.node.ranks if shares[rank].elements]

    def show(self, target: Target, look: Callable[[Pass], None]) -> None:
        """Have every watcher `look` at something of `target`; a failure is kept for `raise_failure`."""
        for watcher in self.watchers:
            with self.keeping_failure(watcher.name, target.fqn):
                look(watcher)

    @contextlib.contextmanager
    def keeping_failure(self, pass_name: str, fqn: str) -> Iterator[None]:
        """A block of others' code, whose failure is kept for `raise_failure`: other ranks count on this one."""
        try:
            with Naming(pass_name, fqn):
                yield
        except Exception as error:  # noqa: BLE001  # raised later
            self.failure = self.failure or error

    def raise_failure(self) -> None:
        """Raise what was kept."""
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Wait for copies to the host; raise `CheckpointError` if a file has changed since it was opened."""
        self.reader.check_unchanged()
        self.host_copies.wait()


@contextlib.contextmanager
def loading(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    setting: Setting,
    job: Job,
    report: Report,
    *,
    watchers: Sequence[Pass] = (),
) -> Iterator[Loading]:
    """A block in which a model is filled. At its end nothing is read or drawn any more, whatever happened."""
    rank, strategy = job.ranks.rank, setting.strategy
    buffers = ShardBuffers(partition=strategy.partition, devices=strategy.devices(rank), rank=rank)
    with contextlib.ExitStack() as stack:
        yield Loading(
            checkpoint=checkpoint,
            targets=targets,
            setting=setting,
            job=job,
            report=report,
            watchers=watchers,
            reader=stack.enter_context(checkpoint.reader(on_read=report.count_bytes)),
            host_copies=stack.enter_context(HostCopies(buffers.devices.compute)),
            stop=threading.Event(),
            buffers=buffers,
            _stack=stack,
        )


def requests(batches: Iterable[Batch], partition: Partition, rank: int) -> Iterator[Request]:
    """The ranges that `rank` reads of targets that are whole tensors, in the order in which it uses them."""
    for batch in batches:
        for target in batch.targets:
            yield from wanted(target, partition.slice(target.form, rank))


def wanted(target: Target, share: Slice) -> Iterator[Request]:
    """The ranges that a rank reads of the segments of `target`, of which it has `share`."""
    if not target.segments or not share.elements:
        return
    if target.stored is None:
        unit, elements = target.segments[0].unit, share.elements
        stop = -(-elements.stop // unit) * unit
        yield Request(segments=target.segments, start=elements.start // unit * unit, stop=stop)
        return
    yield Request(segments=target.segments, start=share.reads.start, stop=share.reads.stop)
    if share.blocks:
        absmax = Segment(entry=target.stored.absmax)
        yield Request(segments=(absmax,), start=share.blocks.start, stop=share.blocks.stop)


def current_targets(model: nn.Module, targets: Iterable[Target]) -> tuple[Target, ...]:
    """`targets` as `model` has them by now.

    Those of modules that are gone, or that hold something else than a tensor on meta by now, are left out; what was
    tied meanwhile is filled once; what was cast has its new dtype. Raises `ConfigError` for a packed weight of another
    shape or dtype than it was bound with, and for a tie that is broken.
    """
    modules = set(modules_of(model))
    found: dict[int, Target] = {}
    for target in targets:
        places = tuple((module, leaf) for module, leaf in target.places if module in modules)
        held = {id(tensor): tensor for tensor in (_held(*place) for place in places) if tensor is not None}
        if len(held) > 1:
            raise ConfigError(
                f"{target.fqn} is tied in the checkpoint's model, and was given several parameters before it was "
                "filled: untie it after fill(), or set tie_word_embeddings to false in config.json"
            )
        for key, tensor in held.items():
            if tensor.is_meta:
                found[key] = _merged(found[key], places) if key in found else _as_held(target, places, tensor)
    return tuple(found.values())


def _held(module: nn.Module, leaf: str) -> torch.Tensor | None:
    parameter = module._parameters.get(leaf)
    return module._buffers.get(leaf) if parameter is None else parameter


def _merged(target: Target, places: tuple[tuple[nn.Module, str], ...]) -> Target:
    return replace(target, places=(*target.places, *places))


def _as_held(target: Target, places: tuple[tuple[nn.Module, str], ...], held: torch.Tensor) -> Target:
    if target.is_packed and (held.dtype, held.shape) != (target.dtype, target.shape):
        raise ConfigError(
            f"{target.fqn} was bound as {target.dtype} {tuple(target.shape)}, packed, and is {held.dtype} "
            f"{tuple(held.shape)} by now: packed weights can be neither cast nor reshaped before fill()"
        )
    if held.shape != target.shape:
        raise ConfigError(
            f"{target.fqn} has shape {tuple(target.shape)} in the checkpoint, and {tuple(held.shape)} in the model by "
            "now: resize it after fill()"
        )
    same = held.dtype == target.dtype and len(places) == len(target.places)
    return target if same else replace(target, places=places, dtype=held.dtype)


#: Most elements of a batch, however many ranks there are: the statistics of all take 64 MiB on every rank, and about
#: four times as much while they are quantized themselves.
LAYER_LIMIT = 1 << 30

#: Elements that are read at a time: for a GPU 32 MiB of a 16-bit weight, few requests for many bytes; for a CPU 1 MiB,
#: which takes milliseconds to quantize, long against the waking of a thread.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Buffers that a rank reads ahead into: `buffers` of `elements` each, filled by `threads`; and the size of a batch.

    layer_elements: elements of a batch that one rank reads, about. Each batch costs a meeting of all ranks, and holds
    its float32 statistics of all ranks.
    """

    elements: int
    buffers: int
    threads: int
    layer_elements: int

    def layer_limit(self, world_size: int) -> int:
        """Most elements of a batch, over all ranks."""
        return min(self.layer_elements * world_size, LAYER_LIMIT)

    @classmethod
    def on(cls, device: torch.device) -> Staging:
        """The staging for a kind of device.

        A GPU is fed by as many threads as there are cores for it, up to 12: one copies some 3 GB/s out of the page
        cache, and 12 keep ahead of quantizing. A CPU quantizes more slowly than one thread reads.
        """
        if device.type == "cpu":
            return cls(
                elements=CHUNK_ELEMENTS["cpu"],
                buffers=3,
                threads=1,
                layer_elements=1 << 23,
            )
        threads = max(1, min(12, cores() // max(torch.cuda.device_count(), 1)))
        return cls(
            elements=CHUNK_ELEMENTS["cuda"],
            buffers=threads + 4,
            threads=threads,
            layer_elements=1 << 28,
        )


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
