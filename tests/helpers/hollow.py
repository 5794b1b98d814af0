"""Checkpoints that weigh nothing: real headers, and holes where the weights would be."""

from __future__ import annotations

import json
import math
from pathlib import Path

from checkpoints.llama import LlamaShape
from checkpoints.shards import file_names, split, write_index

__all__ = ["LLAMA_70B", "LLAMA_405B", "write_hollow"]

LLAMA_405B = LlamaShape(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocab=128256)
LLAMA_70B = LlamaShape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocab=32000)

ITEMSIZE = 2


def write_hollow(folder: Path, shape: LlamaShape, *, shards: int = 1) -> Path:
    """A bfloat16 checkpoint of `shape` in sparse files, which a file system keeps in some kilobytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = shape.tensors()
    sizes = {name: math.prod(dims) * ITEMSIZE for name, dims in shapes.items()}
    runs = split(sizes, shards)
    for file, names in zip(file_names(len(runs)), runs, strict=True):
        _write_sparse(folder / file, {name: shapes[name] for name in names})
    write_index(folder, runs, sum(sizes.values()))
    config = shape.config(dtype="bfloat16", special_tokens={"bos_token_id": 0, "eos_token_id": 1})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, dims in shapes.items():
        start, end = end, end + math.prod(dims) * ITEMSIZE
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)
