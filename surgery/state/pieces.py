"""Pieces of tensors, as torch.distributed.checkpoint writes and reads them: boxes of a whole one, on any ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from surgery.errors import StateError
from surgery.sharding.base import Span

__all__ = ["SavedPiece", "read_pieces", "write_pieces"]

#: `(offsets, sizes, elements before it in the range)`
Box = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True, kw_only=True)
class SavedPiece:
    """This rank's elements of a tensor. path: its keys in the state dict. memory: 1-D, with the elements of `span`."""

    path: tuple[str, ...]
    span: Span
    memory: torch.Tensor

    @property
    def key(self) -> str:
        """The name in the checkpoint."""
        return ".".join(self.path)

    def boxes(self) -> Iterator[tuple[ChunkStorageMetadata, torch.Tensor]]:
        """The boxes that the elements make in the whole tensor, and the memory of each."""
        span = self.span
        for offsets, sizes, before in _boxes(span.shape, span.start, span.start + span.numel):
            first = span.offset + before
            memory = self.memory[first : first + math.prod(sizes)].view(sizes)
            yield ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)), memory


def _boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Divide a range of a flattened tensor into boxes: the end of a row, whole rows, the beginning of another."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,), 0) if shape else ((), (), 0)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first < last:
        rest = len(shape) - 1
        yield (first, *(0,) * rest), (last - first, *shape[1:]), first * row - start
    edges = [(start, min(stop, first * row))]
    if stop > last * row and last >= first:
        edges.append((last * row, stop))
    for low, high in edges:
        number = low // row
        for offsets, sizes, before in _boxes(shape[1:], low - number * row, high - number * row):
            yield (number, *offsets), (1, *sizes), low - start + before


def write_pieces(folder: Path, pieces: Sequence[SavedPiece]) -> None:
    """Write the pieces of all ranks to `folder`, and bring them to the disk; the lowest rank's where several have one.

    Collective. Raises `StateError` on all ranks where one fails.
    """
    planner = _SavePlanner(pieces)
    _on_all_ranks(folder, "written", save, storage_writer=FileSystemWriter(folder), planner=planner)


def read_pieces(folder: Path, pieces: Sequence[SavedPiece]) -> None:
    """Fill the memory of this rank's pieces from `folder`; on other ranks there may be others.

    Collective. Raises `StateError` on all ranks where one fails.
    """
    planner = _LoadPlanner(pieces)
    _on_all_ranks(folder, "read", load, storage_reader=FileSystemReader(folder), planner=planner)


def _on_all_ranks(folder: Path, what: str, run: Any, **options: Any) -> None:
    try:
        with warnings.catch_warnings():
            # What it says of a single process is meant so.
            warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninitialized")
            run({}, no_dist=not dist.is_initialized(), **options)
    except CheckpointException as failed:
        rank, (error, _) = next(iter(failed.failures.items()))
        if isinstance(error, KeyboardInterrupt):
            raise error from None
        raise StateError(
            f"the training state {folder} cannot be {what}: {type(error).__name__} on rank {rank}: {error}. Earlier "
            "states are as they were; mend that, or choose another folder",
            path=folder,
        ) from error


class _SavePlanner(DefaultSavePlanner):
    """A plan to write pieces. Of replicas the lowest rank's is taken, so that all of them are of one model."""

    def __init__(self, pieces: Sequence[SavedPiece]) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._pieces = pieces
        self._boxes: dict[MetadataIndex, torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for piece in self._pieces:
            for box, memory in piece.boxes():
                index = MetadataIndex(piece.key, box.offsets)
                properties = TensorProperties.create_from_tensor(memory)
                written = TensorWriteData(chunk=box, properties=properties, size=piece.span.shape)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=written))
                self._boxes[index] = memory
        # By the paths torch's own tools make a nested state dict of it.
        self.plan = SavePlan(items, planner_data={piece.key: piece.path for piece in self._pieces})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._boxes[index]


class _LoadPlanner(DefaultLoadPlanner):
    """A plan to read pieces."""

    def __init__(self, pieces: Sequence[SavedPiece]) -> None:
        super().__init__()
        self._pieces = pieces
        self._boxes: dict[MetadataIndex, torch.Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        items = []
        for piece in self._pieces:
            boxes = list(piece.boxes())
            saved = self.metadata.state_dict_metadata[piece.key] if boxes and self.metadata else None
            if not isinstance(saved, TensorStorageMetadata):
                continue
            items += create_read_items_for_chunk_list(piece.key, saved, [box for box, _ in boxes])
            self._boxes |= {MetadataIndex(piece.key, box.offsets): memory for box, memory in boxes}
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._boxes[index]
