"""Quantize a checkpoint on disk, and back: each rank reads its part of every weight, and writes what it makes of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from surgery.adapters.metadata import versions
from surgery.bound import agree, building, set_up
from surgery.checkpoint import Checkpoint, PackedWeight, TensorEntry
from surgery.checkpoint.packed import INT8
from surgery.comm.background import return_freed_memory
from surgery.comm.environment import compute_device, launched_world_size
from surgery.comm.failures import collective, everyone
from surgery.comm.heartbeat import beating
from surgery.comm.ranks import Ranks, current_ranks
from surgery.config import Quant
from surgery.errors import ConfigError, WeightsMismatchError
from surgery.model.keys import conversions_of
from surgery.passes.base import Batch, BatchPass, Naming, Pass
from surgery.passes.exchange import Exchange
from surgery.passes.loading import CHUNK_ELEMENTS, Job, Loading, loading
from surgery.passes.pipeline import Pipeline
from surgery.passes.prepare import Prepared, prepare
from surgery.passes.quantize import Quantize
from surgery.passes.read import Read, ReadAhead
from surgery.passes.tensors import ShardBuffer, Target
from surgery.sharding.base import ShardStrategy, register
from surgery.sharding.partition import Grid, Partition, chunk
from surgery.telemetry.report import Report
from surgery.writing.apart import Apart, apart
from surgery.writing.output import MAX_SHARD_BYTES, Planned, check_output, finite, output
from surgery.writing.packing import planned_beside
from surgery.writing.sidecars import changed_config, sidecars

__all__ = ["dequantize", "identity", "quantize", "stored_dtype"]

#: Two functions that write, or compare with what was written: elements of a tensor from a place on, and a text.
Sink: TypeAlias = tuple[Callable[[str, torch.Tensor, int], None], Callable[[str, str], None]]


def quantize(
    checkpoint: Checkpoint | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    quant: Quant = Quant(),  # noqa: B008  # frozen
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = False,
    device: torch.device | None = None,
    report: Report | None = None,
) -> Path:
    """Write `checkpoint` to `directory` with its linear weights in 4 bits; to be called on all ranks alike.

    The bytes are those that `surgery.qlora` makes in memory, in the files that `save_pretrained` writes of a model in
    4 bits: docs/formats.md. A rank has in memory a few MiB that it has read, and its share of a layer or two, packed.
    A call that was killed goes on where it stopped, with any number of ranks.

    Args:
        checkpoint: an open checkpoint, a folder, a safetensors file, or a hub id, in 16 or 32 bits.
        directory: the new folder.
        quant: how linear weights are quantized; `quant_storage=None` is uint8 here, as upstream writes it.
        dtype: in which weights are quantized, and the others stay; None is that of the checkpoint.
        max_shard_bytes: most bytes of a file.
        overwrite: whether a checkpoint in `directory` may be replaced, with all that is in the folder.
        verify: read and quantize everything once more, and compare it with what is on the disk, before the folder gets
            its name.
        device: on which this rank quantizes; None means its accelerator, or the CPU.
        report: filled with seconds and memory peaks; None makes one that shows progress on rank 0.

    Returns:
        The path of the new folder.

    Raises:
        ConfigError: options that cannot work together, or a `directory` that cannot be written, before anything is
            read.
        CheckpointError: a checkpoint that is broken, or not of the model in its config.json.
        ExportError: the disk is full, or what was written is not what it was.
        PeerError: on the other ranks.
    """
    if not isinstance(quant, Quant):
        raise ConfigError(f"quant: expected a surgery.Quant, found {quant!r:.80}")
    if quant.quant_storage is None:
        quant = replace(quant, quant_storage=torch.uint8)
    options = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
    return _convert(
        checkpoint, directory, quant=quant, dtype=dtype, verify=verify, device=device, report=report, **options
    )


def dequantize(
    checkpoint: Checkpoint | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = False,
    report: Report | None = None,
) -> Path:
    """Write `checkpoint`, which is packed in 4 or 8 bits, to `directory` in 16; to be called on all ranks alike.

    The values are those that a quantized layer multiplies with. What quantizing has lost stays lost. Arguments, result
    and errors are those of `quantize`; dtype: of all weights, None is that in which they were quantized to 4 bits, or
    the one in config.json.
    """
    options = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
    device = torch.device("cpu")
    return _convert(
        checkpoint, directory, quant=None, dtype=dtype, verify=verify, device=device, report=report, **options
    )


def _convert(
    checkpoint: Checkpoint | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    quant: Quant | None,
    dtype: torch.dtype | None,
    verify: bool,
    device: torch.device | None,
    report: Report | None,
    **options: Any,
) -> Path:
    """Do the work of `quantize`, or of `dequantize` where `quant` is None."""
    device = compute_device(device)
    with building(device) as ranks:
        with everyone(ranks, device=device):
            if ranks.rank == 0:
                check_output(directory, overwrite=options["overwrite"])
            opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
            _check_source(opened, quant)
            dtype = dtype or stored_dtype(opened)
        asked = {"quant": quant, "shard": Parts(), "lora": None, "placement": None, "device": device}
        setting, _ = agree(ranks, "quantize", (), opened, **asked, dtype=dtype, compute_dtype=dtype)
        job = set_up(setting, ranks)
        verbs = ("Dequantizing", "Dequantized") if quant is None else ("Quantizing", "Quantized")
        report = report or Report(show_progress=ranks.rank == 0, verbs=verbs, device=device)
        with everyone(ranks, device=device):
            prepared = prepare(opened, setting, ranks=ranks, device=device)
            report.note("ignored", prepared.ignored)
            report.note("left_out", prepared.left_out)
            plan = tuple(_planned(prepared, opened))
        with output(
            directory,
            [tensor for part in plan for tensor in part.tensors],
            job=json.dumps([identity(opened), str(quant), str(dtype), device.type, versions()]),
            ranks=ranks,
            device=device,
            files=_files(opened, prepared),
            sources=opened.places,
            **options,
        ) as out:
            left = [part for part in plan if not out.is_done(*(tensor.name for tensor in part.tensors))]
            _stream(prepared, left, checkpoint=opened, job=job, report=report, sink=(out.write, out.write_state))
            if verify:
                with everyone(ranks, device=device):
                    out.flush()
                # Gates and counters are of one fill.
                again = current_ranks(launched_world_size())
                report = Report(show_progress=report.show_progress, verbs=("Verifying", "Verified"), device=device)
                with beating(again), collective(again):
                    job = replace(job, ranks=again)
                    sink = (out.check, out.check_state)
                    _stream(prepared, plan, checkpoint=opened, job=job, report=report, sink=sink)
        return out.target


def _check_source(checkpoint: Checkpoint, quant: Quant | None) -> None:
    if quant is not None and checkpoint.packing is not None:
        raise ConfigError(
            f"expected weights in 16 or 32 bits, found packed ones in {checkpoint.source} ({checkpoint.packing.kind}): "
            "it can be used as it is, or written in 16 bits (surgery dequantize)"
        )
    if quant is None and checkpoint.packing is None:
        raise ConfigError(f"expected weights that are packed in 4 or 8 bits, found none in {checkpoint.source}")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of weights before they were packed in 4 bits; or that config.json names; or that most weights have."""
    if checkpoint.packing is not None and checkpoint.packing.quant_type != INT8:
        return checkpoint.packing.dtype
    config = checkpoint.config or {}
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str) and isinstance(found := getattr(torch, named, None), torch.dtype):
        return found
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.index.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)


def identity(checkpoint: Checkpoint) -> str:
    """A digest of the content of the files: of config.json, of headers, and of the commit, or else of sizes and times.

    The time of the last change counts, which is not for programs to set, unlike that of the last write.
    """
    index = checkpoint.index
    headers = [[stamp.header, stamp.size] for stamp in index.stamps.values()]
    times = [file.stat().st_ctime_ns for file in index.files] if checkpoint.revision is None else []
    what = json.dumps([checkpoint.revision, headers, times, checkpoint.config], sort_keys=True)
    return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Parts:
    """Options of a job that writes: each rank makes its part of every tensor, and keeps nothing."""


class _Parts(ShardStrategy):
    label = "written in parts"

    @property
    def partition(self) -> Partition:
        return Partition(grid=Grid(shards=self.world_size))

    def check_group(self) -> None:
        """A single process has none."""


register(Parts, _Parts)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Tensors of the output that are made together.

    target: what is quantized, or else converted, for them; None for one that is a copy of `source`, or of `packed`
    dequantized, which is then turned if `is_transposed`, or taken `apart`. duplicates: names of further copies in the
    checkpoint.
    """

    tensors: tuple[Planned, ...]
    target: Target | None = None
    source: TensorEntry | None = None
    packed: PackedWeight | None = None
    is_transposed: bool = False
    apart: Apart | None = None
    duplicates: tuple[str, ...] = ()


def _planned(prepared: Prepared, checkpoint: Checkpoint) -> Iterator[_Part]:
    """Everything that is written, in the order of the model.

    What upstream's conversion merges or splits stays as the checkpoint has it, unless some of it is quantized.
    """
    # Statistics stay whole, the state of a weight, as they are written.
    targets = [target for target in prepared.targets if target.statistics_of is None]
    quantized = {target.assignment for target in targets if target.is_quantized}
    seen = set()
    for target in targets:
        assignment = target.assignment
        if assignment in quantized:
            yield _Part(tensors=tuple(_entries(target)), target=target)
            continue
        for name in assignment.sources if assignment not in seen else ():
            entry = checkpoint.logical(name)
            dtype = target.dtype if entry.dtype.is_floating_point else entry.dtype
            shape = entry.shape[:: -1 if target.is_transposed else 1]
            packed = checkpoint.packed.get(name)
            pieces = None
            if packed is not None and packed.settings.is_stack:
                empty = torch.empty(shape, dtype=dtype, device="meta")
                conversions = conversions_of(prepared.model, checkpoint.index.keys())
                pieces = apart(assignment, target.fqn, empty, prepared.model, conversions)
            yield _Part(
                tensors=(Planned(name=name, dtype=dtype, shape=shape),) if pieces is None else pieces.tensors,
                source=entry,
                packed=packed,
                is_transposed=target.is_transposed,
                apart=pieces,
                duplicates=assignment.duplicates,
            )
        seen.add(assignment)


def _entries(target: Target) -> Iterator[Planned]:
    name = target.assignment.key_of(target.fqn)
    yield Planned(name=name, dtype=target.dtype, shape=tuple(target.shape))
    if target.logical is not None and target.quant is not None:
        yield from planned_beside(name, target.quant, target.logical)


def _files(checkpoint: Checkpoint, prepared: Prepared) -> dict[str, bytes | Path]:
    setting, model = prepared.setting, prepared.model
    written: Any = getattr(model, "config", None)
    quantization = None if setting.quant is None else written.quantization_config.to_dict()
    config = changed_config(checkpoint.config, dtype=setting.dtype, quantization=quantization)
    dtype = config["dtype"]
    name = Path(checkpoint.source).name or checkpoint.path.name
    if setting.quant is None:
        settings = {"dequantized from": checkpoint.packing.kind if checkpoint.packing else None, "dtype": dtype}
        return sidecars(checkpoint, config, title=f"{name}, dequantized", relation="finetune", settings=settings)
    settings = {
        "quantization": f"{setting.format.label}, {setting.format.description}",
        "double quantization": setting.quant.double_quant,
        "quantized in": dtype,
    }
    if any(target.is_quantized and target.quant is not None and target.quant.by_expert for target in prepared.targets):
        settings["experts"] = "in 4 bits, which transformers does not read: `surgery dequantize` writes 16 bits"
    return sidecars(checkpoint, config, title=f"{name} in 4 bits", relation="quantized", settings=settings)


def _stream(
    prepared: Prepared, parts: Sequence[_Part], *, checkpoint: Checkpoint, job: Job, report: Report, sink: Sink
) -> None:
    """Make `parts`, each rank its own, and give them to `sink`."""
    targets = [part.target for part in parts if part.target is not None]
    watchers = [_Finite(dtype=prepared.setting.dtype)]
    with loading(checkpoint, targets, prepared.setting, job, report, watchers=watchers) as shared:
        quantize = Quantize(loading=shared)
        passes = (
            _Copy(loading=shared, parts=[part for part in parts if part.target is None], sink=sink, shows=not targets),
            ReadAhead(loading=shared),
            Read(loading=shared),
            quantize,
            Exchange(loading=shared, quantize=quantize),
            _Write(loading=shared, sink=sink),
        )
        Pipeline(passes=passes if targets else passes[:1], loading=shared).run(prepared.model)
        shared.settle()
    return_freed_memory()


@dataclass(frozen=True, kw_only=True)
class _Finite(Pass):
    """Refuse weights to be quantized that have NaN or infinity, which 4 bits do not show any more.

    dtype: in which most are quantized.
    """

    name = "check"

    dtype: torch.dtype

    def see_values(self, target: Target, start: int, values: torch.Tensor) -> None:  # noqa: ARG002  # of Pass
        """Look at `values` in the dtype in which they are quantized. Raises `ExportError`."""
        finite(values.to((target.precision or self.dtype) if target.is_quantized else target.dtype), target.fqn)


@dataclass(frozen=True, kw_only=True)
class _Copy(Pass):
    """Give the sink what is not quantized, in the dtype of the model; each rank its part, piece by piece.

    shows: whether it is what takes long, and progress is shown.
    """

    name = "copy"

    loading: Loading
    parts: Sequence[_Part] = field(repr=False)
    sink: Sink
    shows: bool

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, which nothing is done with."""
        ranks = self.loading.ranks
        report = self.loading.report if self.shows else Report()
        for part in report.track(self.parts, names=lambda part: [part.tensors[0].name]):
            ranks.raise_peer_failure()
            with Naming(self.name, part.tensors[0].name):
                self._copy(part, ranks)
        return model

    def _copy(self, part: _Part, ranks: Ranks) -> None:
        assert part.source is not None
        planned, whole = part.tensors[0], range(part.source.numel)
        if part.is_transposed:
            # No range of one is a range of the other, so that one rank makes all of it; ranks take turns.
            mine = whole if sum(planned.name.encode()) % ranks.world_size == ranks.rank else whole[:0]
            size = max(len(whole), 1)
        else:
            mine, size = chunk(whole, ranks.world_size, ranks.rank), CHUNK_ELEMENTS["cpu"]
        for start in range(mine.start, mine.stop, size):
            piece = self._read(part, start, min(start + size, mine.stop))
            # What is not computed with is the source's own affair, such as a mask.
            is_copy = part.packed is None and piece.dtype == planned.dtype
            piece = piece if is_copy else finite(piece.to(planned.dtype), planned.name)
            for name in part.duplicates:
                self._check_same(name, part, piece, start)
            if part.apart is None:
                self.sink[0](planned.name, piece, start)
            else:
                part.apart.write(self.sink[0], piece, start)

    def _read(self, part: _Part, start: int, stop: int) -> torch.Tensor:
        read = self.loading.reader.read_range
        if part.packed is None:
            assert part.source is not None
            return read(part.source, start, stop)
        if not part.is_transposed:
            return part.packed.dequantize(read, start, stop)
        size = CHUNK_ELEMENTS["cpu"]
        settings = part.packed.settings
        found = torch.empty(stop, dtype=settings.dtype)
        for first in range(0, stop, size):
            found[first : first + size] = part.packed.dequantize(read, first, min(first + size, stop))
        return found.view(settings.shape).t()

    def _check_same(self, name: str, part: _Part, piece: torch.Tensor, start: int) -> None:
        other = self.loading.reader.read_range(name, start, start + piece.numel())
        if not torch.equal(other.to(piece.dtype), piece):
            raise WeightsMismatchError(
                f"{name} and {part.tensors[0].name} differ in the checkpoint, but the model ties them: set "
                "tie_word_embeddings to false in config.json if they are two",
                tensor=name,
            )


@dataclass(frozen=True, kw_only=True)
class _Write(BatchPass):
    """Give the sink what this rank has made of the tensors of a batch, and forget it."""

    name = "write"

    loading: Loading
    sink: Sink

    def run_batch(self, batch: Batch) -> None:
        """Give away the buffers of `batch`."""
        ranks = self.loading.ranks
        for number, buffer in enumerate(batch.buffers):
            name = buffer.target.assignment.key_of(buffer.target.fqn)
            with Naming(self.name, name):
                self.sink[0](name, buffer.read_rows(), buffer.slice.reads.start * buffer.row)
                # Every rank has the state; they take turns.
                if buffer.target.is_quantized and (batch.number + number) % ranks.world_size == ranks.rank:
                    self._put_state(name, buffer)
        batch.buffers.clear()

    def _put_state(self, name: str, buffer: ShardBuffer) -> None:
        assert buffer.target.quant is not None
        for end, value in buffer.target.quant.saved(buffer.state).items():
            if isinstance(value, torch.Tensor):
                self.sink[0](f"{name}.{end}", value, 0)
            else:
                self.sink[1](f"{name}.{end}", value)
