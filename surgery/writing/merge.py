"""Adapters merged into a checkpoint: read, merged and written piece by piece, on any number of ranks."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.adapters.metadata import TOKENIZER_FILES, versions
from surgery.checkpoint import Checkpoint
from surgery.comm.environment import compute_device, launched_world_size
from surgery.comm.failures import collective, everyone
from surgery.comm.heartbeat import beating
from surgery.comm.ranks import Ranks, current_ranks
from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.model.consistency import adapter_facts, same_model
from surgery.model.fqn import split
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.weights import plan_weights
from surgery.quantizers.base import QuantFormat, formats_for
from surgery.telemetry.report import Report
from surgery.writing.merge_adapters import Matched, MergeAdapter, check_together, match
from surgery.writing.merge_plan import BaseModel, Readers, Work, changes_of, plan_work
from surgery.writing.merging import adapt, find_sites
from surgery.writing.output import MAX_SHARD_BYTES, Output, Planned, check_output, output
from surgery.writing.packing import quantized_in
from surgery.writing.quantize import identity, stored_dtype
from surgery.writing.sidecars import changed_config, sidecars

__all__ = ["DTYPES", "merge"]

Source = str | os.PathLike[str]

#: Names of `--dtype`.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def merge(
    base: Checkpoint | Source,
    adapters: Source | Sequence[Source],
    directory: Source,
    *,
    weights: Sequence[float] = (),
    dtype: torch.dtype | None = None,
    quant: Quant | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    device: torch.device | None = None,
    report: Report | None = None,
) -> None:
    """Write `base` with `adapters` merged into it to `directory`; to be called on all ranks alike.

    What adapters change is merged by PEFT's own layers, a part of a tensor at a time, and equals what its
    `merge_and_unload` gives of a model that was loaded in the same dtype; every other tensor is copied. Ranks share the
    tensors. A job that was stopped goes on where it was, with any number of ranks.

    An embedding and a head that are tied, and of which adapters change one, or both differently, are two tensors then.

    Args:
        base: an open checkpoint, a folder, or a hub id.
        adapters: folders, or hub ids, of LoRA adapters as PEFT saves them, in the order in which they are merged.
        directory: for the output, which is there whole or not at all.
        weights: with which each adapter is merged; none is 1 for all.
        dtype: of the output; None is that of the base, as its config.json says.
        quant: how linear weights of the output are quantized; None leaves all in 16 or 32 bits. What is packed in the
            base, in the same way, and stays as it is, is copied.
        revision: of a hub id; None is the one that the adapters were trained on, if they say so of this base.
        overwrite: whether a checkpoint in `directory` is replaced.
        max_shard_bytes: most bytes of a file.
        device: on which ranks speak; None means this rank's accelerator, or the CPU.
        report: filled with seconds, bytes and memory; None makes one that shows progress on rank 0.

    Raises:
        ConfigError: adapters that are not of this base, or cannot be merged; an output that cannot be written.
        CheckpointError: a checkpoint, or an adapter, that is broken or lacks tensors.
        ExportError: values that are not finite, with the name of the tensor; a full disk.
        PeerError: another rank has failed.
    """
    device = compute_device(device)
    sources = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    ranks = current_ranks(launched_world_size())
    options: dict[str, Any] = {"overwrite": overwrite}
    report = report or Report(show_progress=ranks.rank == 0, verbs=("Merging", "Merged"))
    with beating(ranks), collective(ranks):
        with everyone(ranks, device=device):
            if not sources or len(weights) not in (0, len(sources)):
                raise ConfigError(
                    f"weights: expected one for each of {len(sources)} adapters, found {len(weights)}"
                    if sources
                    else "expected at least one adapter to merge, found none"
                )
            stored = [
                replace(MergeAdapter.open(source), weight=weight)
                for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
            ]
            for adapter in stored:
                adapter.check()
            checkpoint = base if isinstance(base, Checkpoint) else _open_base(base, stored, revision)
            options["sources"] = [*checkpoint.places, *(each.path for each in stored)]
            if ranks.rank == 0:
                check_output(directory, **options)
            check_together(stored, checkpoint)
            job = _prepare(checkpoint, stored, dtype, quant, ranks)
            report.note("left_out", job.left_out)
            for adapter in stored[ranks.rank :: ranks.world_size]:
                adapter.check_finite()
            files = _files(job, stored)
            text = _identity(job, stored)
        with (
            output(
                directory,
                [*job.planned],
                job=text,
                ranks=ranks,
                device=device,
                files=files,
                max_shard_bytes=max_shard_bytes,
                **options,
            ) as out,
            everyone(ranks, device=device),
        ):
            _write(job, out, ranks, report)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """All that is to be done. untied: whether embedding and head are two tensors from now on.

    quantization: `quantization_config` of the output; None for none. left_out: FQNs of weights that stay in 16 bits
    though their kind is packed.
    """

    checkpoint: Checkpoint
    matched: tuple[Matched, ...]
    works: tuple[Work, ...]
    untied: bool
    dtype: torch.dtype | None
    quantization: Mapping[str, object] | None
    left_out: tuple[str, ...]

    @property
    def planned(self) -> Iterator[Planned]:
        """All tensors of the output, in order."""
        return (planned for work in self.works for planned in work.made)


def _open_base(base: Source, adapters: Sequence[MergeAdapter], revision: str | None) -> Checkpoint:
    """The base, at the revision that an adapter was trained on if none is given."""
    recorded = {each.base.revision for each in adapters if each.base.name == os.fspath(base)}
    if revision is None and len(recorded) == 1 and not Path(base).exists():
        (revision,) = recorded
    return Checkpoint.open(base, revision=revision)


def _prepare(
    checkpoint: Checkpoint,
    adapters: Sequence[MergeAdapter],
    dtype: torch.dtype | None,
    quant: Quant | None,
    ranks: Ranks,
) -> _Job:
    """Build the model and its adapters on meta, and match them with their files; nothing is read."""
    cpu = torch.device("cpu")
    packing, own = checkpoint.packing, dtype or _dtype_of(checkpoint)
    model = build_on_meta(causal_lm(checkpoint, own), dtype=own, device=cpu)
    same_model(ranks, model, checkpoint)
    base = BaseModel.of(model, plan_weights(model, checkpoint, device=cpu), checkpoint)
    quantized: Mapping[str, QuantFormat] = {}
    quantization = None
    left_out: tuple[str, ...] = ()
    if quant is not None:
        quantized, quantization, left_out = _quantization(model, base, checkpoint, quant, own)
    names = [f"merged{number}" for number in range(len(adapters))]
    configs = {name: each.config for name, each in zip(names, adapters, strict=True)}
    matched = []
    for each, (name, adapted) in zip(adapters, adapt(model, configs), strict=True):
        matched.append(match(each, name, adapted, base.tensors))
    sites = find_sites(adapted, base.modules, names)
    for site in sites:
        for name, each in zip(names, adapters, strict=True):
            if each.weight != 1 and name in site.adapters:
                site.layer.set_scale(name, each.weight)
    changes = changes_of(base, matched, sites)
    works, untied = plan_work(base, checkpoint, changes, cast=dtype is not None, quantized=quantized)
    return _Job(
        checkpoint=checkpoint,
        matched=tuple(matched),
        works=works,
        untied=untied,
        dtype=own if dtype is not None or packing is not None else None,
        quantization=quantization,
        left_out=left_out,
    )


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a model: what config.json says, also of packed weights, or else that of most of the weights."""
    config = checkpoint.config or {}
    named: Any = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return next((each for each in (named, stored_dtype(checkpoint)) if each in DTYPES.values()), torch.float32)


def _quantization(
    model: nn.Module, base: BaseModel, checkpoint: Checkpoint, quant: Quant, dtype: torch.dtype
) -> tuple[Mapping[str, QuantFormat], Mapping[str, object], tuple[str, ...]]:
    """FQN -> format of those weights of the output that are packed; its `quantization_config`; what is left out."""
    packing, config = checkpoint.packing, checkpoint.config or {}
    options = replace(quant, quant_storage=quant.quant_storage or torch.uint8)
    formats = formats_for(options, dtype=dtype, compute_dtype=dtype)
    # On a copy, since adapters are merged into modules as they are.
    twin = copy.deepcopy(model)
    if packing is None:
        return quantized_in(twin, formats)
    formats = formats_for(formats[0].options_for(packing), dtype=dtype, compute_dtype=dtype)
    weights, _, left_out = quantized_in(twin, formats, packed=base.weights.packed)
    linear = {fqn: formats[0] for fqn in base.weights.packed if len(base.tensors[fqn].shape) != 3}
    return {**linear, **weights}, config["quantization_config"], left_out


def _write(job: _Job, out: Output, ranks: Ranks, report: Report) -> None:
    """Do this rank's share of what is not done yet."""
    left = [work for work in job.works if not out.is_done(*(planned.name for planned in work.made))]
    loads = [0] * ranks.world_size
    mine = []
    for work in sorted(left, key=lambda work: -work.cost):
        rank = loads.index(min(loads))
        loads[rank] += work.cost
        if rank == ranks.rank:
            mine.append(work)
    order = {work: number for number, work in enumerate(job.works)}
    mine.sort(key=order.__getitem__)
    with Readers(job.checkpoint, job.matched, report) as readers, report.phase("merge"):
        for work in report.track(mine, names=lambda work: [split(work.made[0].name)[0]]):
            work.run(readers, out)
            ranks.raise_peer_failure()
        readers.base.check_unchanged()


def _files(job: _Job, adapters: Sequence[MergeAdapter]) -> dict[str, bytes | Path]:
    """Files beside the weights; the tokenizer is that of the last adapter that has one."""
    rows = {
        f"adapter {number}": f"{each.path.name}: {_described(each)}" for number, each in enumerate(adapters, start=1)
    }
    config = changed_config(job.checkpoint.config, dtype=job.dtype, untied=job.untied, quantization=job.quantization)
    title = "Base model with merged adapters"
    files = sidecars(job.checkpoint, config, title=title, relation="merge", settings=rows)
    for each in adapters:
        own: dict[str, bytes | Path] = {
            name: each.path / name for name in TOKENIZER_FILES if (each.path / name).is_file()
        }
        if own:
            files = {name: file for name, file in files.items() if name not in TOKENIZER_FILES} | own
    return files


def _described(adapter: MergeAdapter) -> str:
    config = adapter.config
    kinds = ["DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA", f"rank {config.r}"]
    return ", ".join([*kinds, f"alpha {config.lora_alpha}", f"weight {adapter.weight:g}"])


def _identity(job: _Job, adapters: Sequence[MergeAdapter]) -> str:
    """All that the values depend on, as text."""
    options = [[each.identity, sorted(adapter_facts(each.config).items()), each.weight] for each in adapters]
    return json.dumps(["merge", identity(job.checkpoint), options, str(job.dtype), str(job.quantization), versions()])
