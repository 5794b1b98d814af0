"""Checkpoints of any size with random weights, written by several processes in bounded memory."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints.byte_tokenizer import MIN_VOCAB, SPECIAL_TOKENS, write_tokenizer
from checkpoints.experts import ExpertsShape
from checkpoints.folder import Recipe, write_json
from checkpoints.llama import LlamaShape
from checkpoints.shards import METADATA, file_names, split, write_index

__all__ = ["SHARD_BYTES", "SyntheticCheckpoint"]

#: Size of a shard unless the number of shards is given. A process holds one shard at a time.
SHARD_BYTES = 2 * 1024**3
STD = 0.02

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """One file to write, picklable for the process that writes it."""

    file: Path
    tensors: Mapping[str, Shape]
    dtype: torch.dtype
    device: torch.device
    seed: int


@dataclass(frozen=True, kw_only=True)
class SyntheticCheckpoint:
    """A random checkpoint: linear and embedding weights and biases from N(0, 0.02), norms from N(1, 0.02).

    A tensor depends only on its name, its shape, `dtype`, `seed` and the type of `device`, so that neither `shards`
    nor `processes` changes a value. shards: None means one for every `SHARD_BYTES`.
    Raises `ValueError` for more shards than tensors, and for a vocabulary too small for the tokenizer.
    """

    shape: LlamaShape | ExpertsShape
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    shards: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.shape.vocab < MIN_VOCAB:
            raise ValueError(f"vocab must be {MIN_VOCAB} or more, the tokens of the tokenizer; got {self.shape.vocab}")
        self._runs()

    def recipe(self) -> Recipe:
        """The parameters that determine values and files, as JSON."""
        return {
            "model": "synthetic",
            **asdict(self.shape),
            "dtype": self._dtype_name,
            "seed": self.seed,
            "shards": len(self._runs()),
            "device": self.device.type,
        }

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _runs(self) -> list[list[str]]:
        return split(self._sizes(), self.shards or math.ceil(self.total_bytes / SHARD_BYTES))

    @property
    def total_bytes(self) -> int:
        """Total size of all tensors."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) * self.dtype.itemsize for name, shape in self.shape.tensors().items()}

    def write(self, folder: Path, *, processes: int) -> Iterator[int]:
        """Write everything to the empty `folder`; yields the bytes of each shard when it is written."""
        runs = self._runs()
        config = self.shape.config(dtype=self._dtype_name, special_tokens=SPECIAL_TOKENS)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", SPECIAL_TOKENS)
        write_tokenizer(folder)
        yield from _write_shards(list(self._jobs(folder, runs)), processes=processes)
        write_index(folder, runs, self.total_bytes)

    def _jobs(self, folder: Path, runs: list[list[str]]) -> Iterator[_Shard]:
        shapes = self.shape.tensors()
        for number, (file, names) in enumerate(zip(file_names(len(runs)), runs, strict=True)):
            yield _Shard(
                file=folder / file,
                tensors={name: shapes[name] for name in names},
                dtype=self.dtype,
                device=_device_of(self.device, number),
                seed=self.seed,
            )


def _device_of(device: torch.device, number: int) -> torch.device:
    """The device that draws the `number`-th shard: the GPUs of the machine in turn."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _write_shards(jobs: list[_Shard], *, processes: int) -> Iterator[int]:
    if min(processes, len(jobs)) == 1:
        yield from map(_write_shard, jobs)
        return
    # spawn: a forked child could not use CUDA, and would inherit unusable thread pools from the parent.
    pool = ProcessPoolExecutor(
        max_workers=min(processes, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, (os.cpu_count() or 1) // processes),),
    )
    with pool:
        futures = [pool.submit(_write_shard, job) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(job: _Shard) -> int:
    """Draw the tensors of one file and write it; returns their bytes."""
    tensors = {name: _draw(name, shape, job).cpu() for name, shape in job.tensors.items()}
    save_file(tensors, job.file, METADATA)
    return sum(tensor.nbytes for tensor in tensors.values())


def _draw(name: str, shape: Shape, job: _Shard) -> torch.Tensor:
    digest = hashlib.sha256(f"{job.seed}/{name}".encode()).digest()
    generator = torch.Generator(job.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    is_norm = len(shape) == 1 and not name.endswith("bias")
    return torch.empty(shape, dtype=job.dtype, device=job.device).normal_(float(is_norm), STD, generator=generator)
