"""The QLoRA recipe: build a model on meta, bind it to a checkpoint, and fill it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.adapters.load import fill_adapter, open_adapter
from surgery.adapters.metadata import name_base
from surgery.bound import agree, building, complete, foresee, set_up
from surgery.checkpoint import Checkpoint
from surgery.comm.environment import compute_device
from surgery.comm.failures import everyone
from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.passes.base import Pass
from surgery.passes.lifetime import release
from surgery.passes.prepare import prepare
from surgery.telemetry.report import Report
from surgery.writing.cache import packed_in

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["qlora"]


def qlora(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    quant: Any = Quant(),  # noqa: B008  # frozen
    lora: LoraConfig | None = None,
    adapter: str | os.PathLike[str] | None = None,
    placement: str | None = None,
    shard: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    model: Callable[[], nn.Module] | None = None,
    device: torch.device | None = None,
    report: Report | None = None,
    passes: Sequence[Pass | str] = (),
    packed_cache: str | os.PathLike[str] | None = None,
    kernels: str | Sequence[str] | None = None,
    attention: str | None = None,
) -> nn.Module:
    """Build a 4-bit model with LoRA adapters from `checkpoint`, sharded; to be called on all ranks alike.

    Each rank reads a part of every weight, and quantizes it; no other rank reads that part. Under FSDP2 it is the part
    that the rank keeps, and no rank ever holds the whole packed model.

    Nothing of bitsandbytes, PEFT or torch is changed but by patches: those that are needed to build are undone on
    return, those that the model needs to run act on its layers alone, until `surgery.release(model)`, the end of
    `with surgery.qlora(...) as model:`, or its collection.

    Args:
        checkpoint: an open checkpoint, a folder, a safetensors file, or a hub id.
        quant: how linear weights are quantized (https://arxiv.org/abs/2305.14314).
        lora: the adapters; None adds none.
        adapter: a saved adapter to go on from, in place of `lora`: a folder in PEFT's format, or a hub id. Its
            configuration decides; its values are cast to `dtype`, and each rank reads those that it keeps.
        placement: `sharded` (FSDP2's default) keeps on every rank its shard and nothing else; `rank0-cpu` (FSDP1's)
            keeps weights on rank 0's CPU, and on meta elsewhere, until FSDP1 broadcasts them; `replicated` keeps all of
            them on every rank's device, and is what a model without `shard` has.
        shard: None leaves the model whole.
        dtype: of everything unquantized, adapters too, and of packed storage unless `quant.quant_storage` says other.
            What transformers keeps in float32 in such a model (router gates, say) is in float32.
        compute_dtype: in which 4-bit linear layers multiply; None means `dtype`, in which experts always do.
        model: builds the module whose parameter names match the checkpoint's; None builds the transformers model that
            the checkpoint's config.json describes.
        device: on which this rank computes; None means its accelerator, or the CPU.
        report: filled with seconds and memory peaks per phase; None makes one that shows progress on rank 0.
        passes: third parties' passes, each a `surgery.Pass` or the name of one that is installed.
        packed_cache: a folder where the first run keeps what it has quantized, for others to read: a quarter of the
            bytes, and no quantizing. Ranks of several hosts share it.
        kernels: names of kernels to train with, `fused` and `liger` (https://github.com/linkedin/Liger-Kernel); with
            the latter, a loss in training comes without logits.
        attention: the implementation of attention, by transformers' names: `sdpa`, `flash_attention_2`, or a
            repository of the hub, such as `kernels-community/flash-attn2`; None is transformers' choice.

    Raises:
        ConfigError: options that cannot work together, before anything is read.
        CheckpointError: a checkpoint, or an adapter, that is broken, or not of this model, before any weight is read.
        PassError: a pass failed; names the pass and the FQN.
        PeerError: it did on another rank.
    """
    device = compute_device(device)
    if packed_cache is not None and model is not None:
        raise ConfigError("packed_cache: expected the model that config.json describes, found model= as well: give one")
    if attention is not None and model is not None:
        raise ConfigError("attention: expected the model that config.json describes, found model= as well: give one")
    if packed_cache is not None:
        checkpoint, quant = packed_in(packed_cache, checkpoint, quant=quant, dtype=dtype, device=device)
    with building(device) as ranks:
        saved = None if adapter is None else open_adapter(adapter, ranks, device=device, lora=lora)
        lora = lora if saved is None else saved.config
        asked = {"quant": quant, "shard": shard, "lora": lora, "placement": placement, "device": device}
        asked |= {"adapter": saved, "kernels": kernels}
        asked |= {"dtype": dtype, "compute_dtype": compute_dtype or dtype}
        setting, found = agree(ranks, "choices", passes, checkpoint, **asked)
        report = report or Report(show_progress=ranks.rank == 0, device=device)
        with everyone(ranks, device=device):
            setting.strategy.check_group()  # which needs no checkpoint
            # Collective for a hub id, but then it fails on all ranks or on none, so that they meet all the same.
            opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
            setting = setting.reading(opened)
        job = set_up(setting, ranks)
        with everyone(ranks, device=device):
            with report.phase("skeleton"):
                prepared = prepare(opened, setting, build=model, attention=attention, ranks=ranks, device=device)
            foresee(prepared, opened, ranks, report)
        adapted = complete(prepared, prepared.model, opened, job, report, lora=lora, passes=found)
        name_base(adapted, opened)
        if saved is not None:
            try:
                with report.phase("adapter"):
                    fill_adapter(adapted, saved, ranks)
            except BaseException:
                release(adapted)  # which nobody else has
                raise
        return adapted
