"""Assignment of tensors to the files of a sharded safetensors checkpoint, and its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from checkpoints.folder import write_json

__all__ = ["INDEX_NAME", "METADATA", "file_names", "split", "write_index"]

INDEX_NAME = "model.safetensors.index.json"

# transformers refuses a file whose metadata does not name the framework.
METADATA = {"format": "pt"}


def split(sizes: Mapping[str, int], shards: int) -> list[list[str]]:
    """Split the names of `sizes` (name -> bytes), in order, into exactly `shards` runs of about equal bytes.

    Raises `ValueError` unless there is a tensor for every shard.
    """
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"expected between 1 and {len(sizes)} shards, one tensor in each; got {shards}")
    total = sum(sizes.values())
    runs: list[list[str]] = [[] for _ in range(shards)]
    current = 0
    for position, (name, end) in enumerate(zip(sizes, accumulate(sizes.values()), strict=True)):
        runs[current].append(name)
        left = len(sizes) - position - 1
        full = end * shards >= total * (current + 1)
        # Each remaining file needs at least one tensor, however small its share of the bytes.
        if current + 1 < shards and (full or left == shards - current - 1):
            current += 1
    return runs


def file_names(shards: int) -> list[str]:
    """Names of the files in the layout of the Hugging Face Hub."""
    if shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]


def write_index(folder: Path, runs: Sequence[Sequence[str]], total_bytes: int) -> None:
    """Write the index, which maps every tensor of `runs` to its file; a checkpoint of one file has none."""
    if len(runs) == 1:
        return
    files = file_names(len(runs))
    weight_map = {name: file for file, names in zip(files, runs, strict=True) for name in names}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
