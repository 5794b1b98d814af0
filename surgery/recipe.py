"""QLoRA as data: which passes, which patches, in which order; opens the transaction."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

import patches
from surgery import guards
from surgery.checkpoint import Checkpoint
from surgery.config import FSDP1, Placement, Quant, parse_placement
from surgery.distributed.exchange import Ranks, current_ranks, everyone
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

__all__ = ["BUILD_PATCHES", "RESIDENT_PATCHES", "default_device", "qlora"]

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
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


def qlora(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    quant: Quant = Quant(),
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
        placement: `rank0-cpu` keeps packed weights on rank 0's CPU, and on meta elsewhere, until FSDP broadcasts them
            (single process: on the CPU); `replicated` keeps all of them on every rank's device.
        shard: None leaves the model whole.
        dtype: of everything unquantized, adapters too, and of packed storage unless `quant.quant_storage` says other.
        compute_dtype: in which 4-bit layers multiply; None means `dtype`.
        model: builds the module whose parameter names match the checkpoint's; None builds the transformers model that
            the checkpoint's config.json describes.
        device: on which this rank computes; None means its accelerator, or the CPU.
        report: filled with seconds and memory peaks per phase.

    Raises:
        ConfigError: options that cannot work together, before anything is read.
        CheckpointError: a checkpoint that is broken, or not of this model, before any weight is read.
        PassError: a pass failed; names the pass and the FQN. PeerError: it did on another rank.
    """
    device = device or default_device()
    ranks = current_ranks(_launched_world_size())
    report = report or Report(show_progress=ranks.rank == 0, device=device)
    placement = parse_placement(placement)
    guards.check_world(shard, placement, ranks.world_size)
    guards.check_sharding(shard, placement, ranks.world_size, device)
    guards.check_precision(quant, shard, dtype)
    guards.check_units(quant, lora, shard, dtype)
    guards.check_adapter(lora, placement, ranks.world_size)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)

    quantizer = BnbQuantizer(quant=quant, dtype=dtype, compute_dtype=compute_dtype or dtype)
    residence = _residence(placement, shard, ranks, device)
    with everyone(ranks, device=device):
        build = model or causal_lm(checkpoint, dtype)
        loaded = _load(checkpoint, build, quantizer, residence, lora, dtype, ranks, report)
    built = _adapt_and_shard(loaded, lora, shard, dtype, device, ranks, report)
    return as_context_manager(_with_resident_patches(built))


def _launched_world_size() -> int | None:
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def _residence(placement: Placement, shard: FSDP1 | None, ranks: Ranks, device: torch.device) -> Residence:
    if shard is None:  # one process, or a whole model on each: nothing would move it to the device later
        placement = "replicated"
    return Residence.of(placement, rank=ranks.rank, compute_device=device)


def _load(
    checkpoint: Checkpoint,
    build: Callable[[], nn.Module],
    quantizer: BnbQuantizer,
    residence: Residence,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    ranks: Ranks,
    report: Report,
) -> nn.Module:
    """The model, quantized and placed; every check that needs no weight comes before the first is read."""
    skeleton = Skeleton(build=build, dtype=dtype, device=residence.compute_device)
    with report.phase(skeleton.name):
        model = skeleton.run()
        assignments = plan_weights(model, checkpoint.index)
        if lora is not None:
            check_targets(model, lora)
    tied = tied_parameters(model)
    skip = quantizer.quant.skip_modules
    with checkpoint.reader() as reader:
        load = Load(
            model=model,
            index=checkpoint.index,
            reader=reader,
            quantizer=quantizer,
            residence=residence,
            tied=tied,
            transposed=transposed(quantizable(model, skip)),
        )
        return Pipeline(
            passes=(
                Replace(quantizer=quantizer, skip_modules=skip),
                load,
                Quantize(quantizer=quantizer, residence=residence),
                Relocate(quantizer=quantizer, residence=residence),
            ),
            given=skeleton.ensures,
            layers=lambda model: group_into_layers(model, assignments),
            report=report,
            between=ranks.check_alarm,
        ).run(model)


def _adapt_and_shard(
    model: nn.Module,
    lora: LoraConfig | None,
    shard: FSDP1 | None,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    report: Report,
) -> nn.Module:
    adapt = () if lora is None else (Adapt(lora=lora, dtype=dtype),)
    pipeline = Pipeline(passes=adapt, given=Relocate.ensures, report=report)
    quant_states = [module.quant_state for module in linear4bits(model)]
    on_cpu = ("torch.fsdp1-sync-on-cpu",) if shard is not None and device.type == "cpu" else ()
    with patches.transaction(
        patches.on("bitsandbytes.quant-state-to-noop", quant_states),
        *BUILD_PATCHES,
        *on_cpu,
        reason="PEFT and FSDP rebuild a 4-bit model that is partly on meta",
    ):
        with everyone(ranks, device=device):
            model = pipeline.run(model)
        if shard is None:
            return model
        return Pipeline(
            passes=(Shard(config=shard, device=device),), given=Relocate.ensures, report=report
        ).run(model)


def _with_resident_patches(model: nn.Module) -> nn.Module:
    layers = linear4bits(model)
    with patches.transaction(*RESIDENT_PATCHES, on=layers, reason="a 4-bit model runs on these layers") as transaction:
        transaction.commit()
    keep(model, transaction.receipts)
    return model
