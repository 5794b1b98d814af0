"""QLoRA as data: which passes, which patches, in which order; opens the transaction."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

import patches
from surgery import guards
from surgery.checkpoint import Checkpoint
from surgery.config import FSDP1, Placement, Quant, parse_placement
from surgery.distributed.exchange import (
    Ranks,
    broadcast_from_rank0,
    collective,
    current_ranks,
    everyone,
    same_patches,
)
from surgery.errors import ConfigError
from surgery.lifetime import as_context_manager, keep
from surgery.passes.adapt import Adapt, check_targets
from surgery.passes.load import Load, group_into_layers
from surgery.passes.pipeline import Pipeline
from surgery.passes.quantize import Quantize
from surgery.passes.relocate import Relocate
from surgery.passes.replace import Replace, quantizable, transposed
from surgery.passes.shard import Shard
from surgery.passes.skeleton import Skeleton, causal_lm
from surgery.placement import Residence
from surgery.quantizers.bnb import BnbQuantizer, linear4bits
from surgery.report import Report
from surgery.walk import tied_parameters
from surgery.weights import plan_weights

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["BUILD_PATCHES", "RESIDENT_PATCHES", "QLoRA", "default_device", "qlora"]

#: Needed while PEFT and FSDP rebuild the model; undone when `qlora` returns.
BUILD_PATCHES = ("torch.meta-param-replacement",)

#: Needed for the model to run; in force for its layers alone until it is released.
RESIDENT_PATCHES = (
    "bitsandbytes.linear4bit-shape",
    "bitsandbytes.linear4bit-apply",
    "bitsandbytes.no-rewrap",
    "bitsandbytes.keep-packing",
)


def default_device() -> torch.device:
    """This rank's accelerator (`LOCAL_RANK`), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def qlora(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    quant: Quant = Quant(),  # noqa: B008  # frozen
    lora: LoraConfig | None = None,
    placement: Placement = "rank0-cpu",
    shard: FSDP1 | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    model: Callable[[], nn.Module] | None = None,
    device: torch.device | None = None,
    report: Report | None = None,
) -> nn.Module:
    """Build a 4-bit model with LoRA adapters from `checkpoint`, sharded; to be called on all ranks alike.

    No rank ever holds more than one unquantized layer. Nothing of bitsandbytes, PEFT or torch is changed but by
    patches: those that are needed to build are undone on return, those that the model needs to run act on its layers
    alone, until `surgery.release(model)`, the end of `with surgery.qlora(...) as model:`, or its collection.

    Args:
        checkpoint: an open checkpoint, a folder, a safetensors file, or a hub id.
        quant: how linear weights are quantized (https://arxiv.org/abs/2305.14314).
        lora: the adapters; None adds none.
        placement: `rank0-cpu` keeps packed weights on rank 0's CPU, and on meta elsewhere, until FSDP broadcasts them;
            `replicated` keeps all of them on every rank's device. Without `shard` the one process keeps all it loads.
        shard: None leaves the model whole.
        dtype: of everything unquantized, adapters too, and of packed storage unless `quant.quant_storage` says other.
        compute_dtype: in which 4-bit layers multiply; None means `dtype`.
        model: builds the module whose parameter names match the checkpoint's; None builds the transformers model that
            the checkpoint's config.json describes.
        device: on which this rank computes; None means its accelerator, or the CPU.
        report: filled with seconds and memory peaks per phase; None makes one that shows progress on rank 0.

    Raises:
        ConfigError: options that cannot work together, before anything is read.
        CheckpointError: a checkpoint that is broken, or not of this model, before any weight is read.
        PassError: a pass failed; names the pass and the FQN.
        PeerError: it did on another rank.
    """
    device = device or default_device()
    ranks = current_ranks(_launched_world_size())
    recipe = QLoRA(
        quant=quant,
        lora=lora,
        placement=parse_placement(placement),
        shard=shard,
        dtype=dtype,
        compute_dtype=compute_dtype or dtype,
        build=model,
        device=device,
        ranks=ranks,
        report=report or Report(show_progress=ranks.rank == 0, device=device),
    )
    recipe.check()
    return recipe.run(checkpoint)


def _launched_world_size() -> int | None:
    value = os.environ.get("WORLD_SIZE")
    if value and not value.isdigit():
        raise ConfigError(f"expected WORLD_SIZE to be a number, found {value!r}: correct or unset it")
    return int(value) if value else None


@dataclass(frozen=True, kw_only=True)
class QLoRA:
    """What `qlora` was asked for, on this rank, with every default filled in."""

    quant: Quant
    lora: LoraConfig | None
    placement: Placement
    shard: FSDP1 | None
    dtype: torch.dtype
    compute_dtype: torch.dtype
    build: Callable[[], nn.Module] | None
    device: torch.device
    ranks: Ranks
    report: Report

    def check(self) -> None:
        """Refuse what cannot work, as `ConfigError`, before anything is opened."""
        guards.check_world(self.shard, self.placement, self.ranks.world_size)
        guards.check_sharding(self.shard, self.placement, self.ranks.world_size, self.device)
        guards.check_precision(self.quant, self.shard, self.dtype)
        guards.check_units(self.quant, self.lora, self.shard, self.dtype)
        guards.check_adapter(self.lora, self.placement, self.shard, self.ranks.world_size)

    def run(self, checkpoint: Checkpoint | str | os.PathLike[str]) -> nn.Module:
        """The model, built from `checkpoint`, with its resident patches in force."""
        same_patches(self.ranks, device=self.device)
        with everyone(self.ranks, device=self.device):
            if not isinstance(checkpoint, Checkpoint):
                # Collective for a hub id, but then it fails on all ranks or on none, so that they meet all the same.
                checkpoint = Checkpoint.open(checkpoint)
            model = self._load(checkpoint)
        model = self._adapt_and_shard(model)
        layers = linear4bits(model)
        with patches.transaction(*RESIDENT_PATCHES, on=layers, reason="a 4-bit model runs on these layers") as resident:
            keep(model, resident.receipts)
            as_context_manager(model)
            # Last: an interrupt before this undoes them with the transaction; after it they are the model's.
            resident.commit()
        return model

    @property
    def _residence(self) -> Residence:
        # Unsharded, nothing would move the weights from a CPU to the device later.
        placement = self.placement if self.shard is not None else "replicated"
        return Residence.of(placement, rank=self.ranks.rank, compute_device=self.device)

    def _load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model, quantized and placed. Every check that needs no weight comes before the first is read."""
        build = self.build or causal_lm(checkpoint, self.dtype)
        with self.report.phase(Skeleton.name):
            model = Skeleton(build=build, dtype=self.dtype, device=self.device).build_on_meta()
            assignments = plan_weights(model, checkpoint.index)
            chosen = quantizable(model, self.quant.skip_modules)
            tied = tied_parameters(model)
            guards.check_ties(self.shard, tied, self.ranks.world_size)
            if self.lora is not None:
                check_targets(model, self.lora)
        quantizer = BnbQuantizer(quant=self.quant, dtype=self.dtype, compute_dtype=self.compute_dtype)
        with checkpoint.reader() as reader:
            load = Load(
                model=model,
                index=checkpoint.index,
                reader=reader,
                quantizer=quantizer,
                residence=self._residence,
                tied=tied,
                transposed=transposed(chosen),
            )
            return Pipeline(
                passes=(
                    Replace(quantizer=quantizer, skip_modules=self.quant.skip_modules),
                    load,
                    Quantize(quantizer=quantizer, residence=self._residence),
                    Relocate(quantizer=quantizer, residence=self._residence),
                ),
                given=Skeleton.ensures,
                layers=lambda model: group_into_layers(model, assignments),
                report=self.report,
                between=self.ranks.check_alarm,
            ).run(model)

    def _adapt_and_shard(self, model: nn.Module) -> nn.Module:
        with contextlib.ExitStack() as undo:
            with everyone(self.ranks, device=self.device):
                # A rank where a patch cannot be applied must not leave the others waiting either.
                undo.enter_context(self._build_patches(model))
                model = self._adapt(model)
            with collective(self.ranks):
                return self._shard(model)

    def _build_patches(self, model: nn.Module) -> patches.Transaction:
        on_cpu = ("torch.fsdp1-sync-on-cpu",) if self.shard is not None and self.device.type == "cpu" else ()
        return patches.transaction(
            patches.on("bitsandbytes.quant-state-to-noop", [module.quant_state for module in linear4bits(model)]),
            *BUILD_PATCHES,
            *on_cpu,
            reason="PEFT and FSDP rebuild a 4-bit model that is partly on meta",
        )

    def _adapt(self, model: nn.Module) -> nn.Module:
        passes = () if self.lora is None else (Adapt(lora=self.lora, dtype=self.dtype),)
        return Pipeline(passes=passes, given=Relocate.ensures, report=self.report).run(model)

    def _shard(self, model: nn.Module) -> nn.Module:
        synced = self.shard is not None and self.shard.sync_module_states
        if self.ranks.world_size > 1 and not synced:
            # Every rank has initialized adapters of its own, and no broadcast follows.
            broadcast_from_rank0((p for p in model.parameters() if p.requires_grad), device=self.device)
        passes = () if self.shard is None else (Shard(config=self.shard, device=self.device),)
        return Pipeline(passes=passes, given=Relocate.ensures, report=self.report).run(model)
