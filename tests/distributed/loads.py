"""Loading on one rank, with all that it reads written down, and the whole tensors that come of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from surgery.checkpoint import Checkpoint, Reader, TensorEntry
from surgery.config import DDP, FSDP1, FSDP2, Placement, Quant

__all__ = ["Job", "Loaded", "Setup", "WatchedCheckpoint", "in_small_steps", "load", "load_all"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the ranks share a model. local_world_size: how many of them are said to be on one node; None: all."""

    placement: Placement
    shard: DDP | FSDP1 | FSDP2 | None
    local_world_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint, and what to make of it. build: None for a model of transformers."""

    folder: Path
    dtype: torch.dtype
    quant: Quant = field(default_factory=Quant)
    build: Callable[[], nn.Module] | None = None


@dataclass(kw_only=True)
class Loaded:
    """What one rank has in the end.

    packed: bytes of whole 4-bit weights, by the FQN of their module. states: their `quant_state` as a dict.
    plain: all other parameters and buffers, whole, by FQN. ranges: `(start, stop)` of every read, in elements, by the
    name of the tensor. bytes_read: what the readers have counted. threads: those that were left behind.
    """

    packed: dict[str, torch.Tensor]
    states: dict[str, dict[str, Any]]
    plain: dict[str, torch.Tensor]
    ranges: dict[str, list[tuple[int, int]]]
    bytes_read: dict[str, int]
    threads: list[str]


class WatchedReader(Reader):
    """Reads as ever, and writes down what."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ranges: dict[str, list[tuple[int, int]]] = {}

    def read_bytes(self, entry: TensorEntry, out: memoryview, *, start: int = 0) -> None:
        super().read_bytes(entry, out, start=start)
        self.ranges.setdefault(entry.name, []).append((start, start + len(out) // entry.dtype.itemsize))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WatchedCheckpoint(Checkpoint):
    """A checkpoint that keeps its readers."""

    readers: list[WatchedReader] = field(default_factory=list)

    def reader(self, *, on_read: Callable[[int], None] | None = None) -> Reader:
        self.readers.append(WatchedReader(self.index, on_read=on_read))
        return self.readers[-1]


def in_small_steps(patch: pytest.MonkeyPatch) -> None:
    """Make a layer of every few tensors, and read large ones in chunks: otherwise a tiny model is one of each."""
    from surgery.passes.loading import Staging

    staging = Staging(elements=4096, buffers=3, threads=2, layer_elements=2000)
    patch.setattr(Staging, "on", lambda *args, **options: staging)


def load_all(jobs: dict[str, Job], setup: Setup) -> dict[str, Loaded]:
    """Every job on this rank, one after the other."""
    if setup.local_world_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(setup.local_world_size)
    return {name: load(job, setup) for name, job in jobs.items()}


def load(job: Job, setup: Setup) -> Loaded:
    """One job; to be called on all ranks alike."""
    import surgery

    before = set(threading.enumerate())
    checkpoint = WatchedCheckpoint.open(job.folder)
    assert isinstance(checkpoint, WatchedCheckpoint)
    with pytest.MonkeyPatch.context() as patch:
        in_small_steps(patch)
        model = surgery.qlora(
            checkpoint,
            quant=job.quant,
            placement=setup.placement,
            shard=setup.shard,
            dtype=job.dtype,
            model=job.build,
            report=surgery.Report(),
        )
    with model:  # type: ignore[attr-defined]  # what `qlora` adds to the class
        tensors = whole_tensors(model)
        states = states_of(model)
    (reader,) = checkpoint.readers
    return Loaded(
        packed={name: tensors.pop(f"{name}.weight").reshape(-1).view(torch.uint8) for name in states},
        states=states,
        plain=tensors,
        ranges=reader.ranges,
        bytes_read=reader.bytes_read,
        threads=[thread.name for thread in set(threading.enumerate()) - before if "surgery" in thread.name],
    )


def whole_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers by plain FQN, gathered from their shards."""
    from surgery.model.fqn import clean

    is_fsdp1 = isinstance(model, FullyShardedDataParallel)
    summoned = FullyShardedDataParallel.summon_full_params(model, writeback=False) if is_fsdp1 else None
    with summoned or contextlib.nullcontext():
        found = [*model.named_parameters(), *model.named_buffers()]
        return {_plain(clean(name)): _whole(tensor.detach()) for name, tensor in found}


def states_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`quant_state` of every 4-bit layer, as a dict, by plain FQN."""
    from bitsandbytes.nn import Linear4bit

    from surgery.model.fqn import clean

    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {_plain(clean(name)): layer.quant_state.as_dict() for name, layer in layers.items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part).removeprefix("module.")  # of DDP


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
