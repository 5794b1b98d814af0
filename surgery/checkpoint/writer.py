"""Write a stream of tensors as a safetensors checkpoint in the layout of the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from surgery.checkpoint.index import Index
from surgery.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from surgery.errors import CheckpointError, ConfigError
from surgery.telemetry.atomic import write_safetensors

__all__ = ["MAX_SHARD_BYTES", "write_checkpoint"]

# The default of transformers, and the Hub's recommendation.
MAX_SHARD_BYTES = 5_000_000_000

Shard = dict[str, torch.Tensor]


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> Index:
    """Write `tensors` to `directory`, in their order, and return the index of what was written.

    One shard becomes `model.safetensors`; several become `model-0000i-of-0000n.safetensors` and an index
    file. At most one shard is held in memory: `max_shard_bytes`, or the largest tensor where that is more.
    Tensors may be on any device but meta, and need not be contiguous; tensors that share memory are each
    written in full.

    Every file appears under its name complete, and the index file last: an interrupted write leaves no
    checkpoint.

    Raises `CheckpointError` if `directory` already holds safetensors files, if a name comes twice, or if
    there are no tensors, and `ConfigError` if a shard could hold nothing.
    """
    if max_shard_bytes <= 0:
        raise ConfigError(f"Expected max_shard_bytes above 0, found {max_shard_bytes}.")
    directory.mkdir(parents=True, exist_ok=True)
    _require_no_weights(directory)
    # transformers refuses a file whose metadata does not say which framework's layout it has.
    header_metadata = {"format": "pt", **(metadata or {})}
    written: list[Path] = []
    try:
        names = _write_shards(directory, _shards(tensors, max_shard_bytes), header_metadata, written)
        _publish(directory, names, written)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    return Index.open(directory)


def _require_no_weights(directory: Path) -> None:
    found = sorted(path.name for path in directory.glob("*.safetensors*"))
    if found:
        raise CheckpointError(
            f"Expected a folder without safetensors files to write to, found {found[0]} in {directory}. "
            "Choose another folder, or remove the old checkpoint first.",
            path=directory,
        )


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> Iterator[Shard]:
    """Group the stream into shards of at most `max_shard_bytes`; a larger tensor is alone in its shard."""
    seen: set[str] = set()
    storages: set[int] = set()
    shard: Shard = {}
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"Expected each name once, found {name!r} twice.", tensor=name)
        seen.add(name)
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size, storages = {}, 0, set()
        shard[name] = _serializable(name, tensor, storages)
        storages.add(shard[name].untyped_storage().data_ptr())
        size += tensor.nbytes
    if not shard:
        raise CheckpointError("Expected at least one tensor to write, found none.")
    yield shard


def _serializable(name: str, tensor: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """`tensor` on the CPU, contiguous, and in none of `storages`, as safetensors needs it; a copy unless it is so."""
    if tensor.is_meta:
        raise CheckpointError(f"Tensor {name!r} is on the meta device: it has no values.", tensor=name)
    ready = tensor.detach().cpu().contiguous()
    return ready.clone() if ready.untyped_storage().data_ptr() in storages else ready


def _write_shards(
    directory: Path, shards: Iterator[Shard], metadata: dict[str, str], written: list[Path]
) -> list[dict[str, int]]:
    """Write the shards under temporary names, noted in `written`; return their tensors' bytes."""
    sizes: list[dict[str, int]] = []
    for number, shard in enumerate(shards, start=1):
        file = directory / f".model-{number:05d}.{os.getpid()}.tmp"
        written.append(file)
        write_safetensors(file, shard, metadata)
        sizes.append({name: tensor.nbytes for name, tensor in shard.items()})
        # Emptied, because this frame would keep it alive while the next shard fills up.
        shard.clear()
    return sizes


def _publish(directory: Path, sizes: list[dict[str, int]], written: list[Path]) -> None:
    """Give the files their names, now that their number is known, and write the index. Updates `written`."""
    if len(written) == 1:
        written[0] = written[0].replace(directory / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    count = len(written)
    for position, names in enumerate(sizes):
        final = f"model-{position + 1:05d}-of-{count:05d}.safetensors"
        written[position] = written[position].replace(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    total = sum(size for names in sizes for size in names.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    temporary = directory / f".{INDEX_NAME}.{os.getpid()}.tmp"
    written.append(temporary)
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written[-1] = temporary.replace(directory / INDEX_NAME)
