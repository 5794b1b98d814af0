"""Options that two ranks cannot work with, and what a rank does to find out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from surgery.config import DDP, FSDP1, FSDP2
from tests.distributed.misfits import refused_misfits

__all__ = ["REFUSALS", "Refusal", "refused_on_this_rank"]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How to shard (None: not at all), and arguments of `surgery.Quant`, `peft.LoraConfig` and `surgery.qlora`."""

    name: str
    shard: DDP | FSDP1 | FSDP2 | None = field(default_factory=FSDP1)
    quant: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    world_size: str | None = None
    says: tuple[str, ...]


def _cast(dtype: torch.dtype) -> FSDP1:
    return FSDP1(mixed_precision=MixedPrecision(param_dtype=dtype))


def _cast_by_fsdp2(dtype: torch.dtype) -> FSDP2:
    return FSDP2(mixed_precision=MixedPrecisionPolicy(param_dtype=dtype))


REFUSALS = (
    Refusal(
        name="not-sharded",
        shard=None,
        options={"placement": "rank0-cpu"},
        says=("1 of 2 ranks on meta", "shard=FSDP1()", "replicated"),
    ),
    Refusal(
        name="shards-of-nothing",
        shard=None,
        options={"placement": "sharded"},
        says=("placement sharded", "shard=FSDP2()", "placement='replicated'"),
    ),
    Refusal(
        name="shards-of-fsdp1",
        options={"placement": "sharded"},
        says=("placement sharded", "FSDP1 makes its shards itself", "placement='rank0-cpu'"),
    ),
    Refusal(
        name="rank0-of-fsdp2",
        shard=FSDP2(),
        options={"placement": "rank0-cpu"},
        says=("rank0-cpu", "FSDP2 does not do", "'sharded'", "shard=FSDP1()"),
    ),
    Refusal(
        name="shards-of-ddp",
        shard=DDP(),
        options={"placement": "sharded"},
        says=("placement sharded", "the whole model on every rank", "placement='replicated'", "shard=FSDP2()"),
    ),
    Refusal(
        name="rank0-of-ddp",
        shard=DDP(),
        options={"placement": "rank0-cpu"},
        says=("placement rank0-cpu", "the whole model on every rank", "placement='replicated'"),
    ),
    Refusal(
        name="mesh",
        shard=FSDP1(strategy="hybrid-shard", mesh=(2, 2)),
        says=("mesh=(2, 2) needs 4 ranks", "there are 2"),
    ),
    Refusal(name="mesh-of-fsdp2", shard=FSDP2(mesh=(3, 1)), says=("mesh=(3, 1) needs 3 ranks", "there are 2")),
    Refusal(name="more-promised", world_size="3", says=("started 3 processes", "a process group of 2")),
    Refusal(name="fewer-promised", world_size="1", says=("started 1 processes", "a process group of 2")),
    Refusal(name="no-sync", shard=FSDP1(sync_module_states=False), says=("sync_module_states", "uninitialized")),
    Refusal(name="offload-to-where-it-is", shard=FSDP1(cpu_offload=True), says=("cpu_offload", "only a CPU")),
    Refusal(name="uint8", quant={"quant_storage": torch.uint8}, says=("uint8", "FSDP1", "torch.bfloat16")),
    Refusal(name="fp16-over-bf16", shard=_cast(torch.float16), says=("float16", "bfloat16", "garbage")),
    Refusal(name="fp32-over-bf16", shard=_cast(torch.float32), says=("float32", "bfloat16", "garbage")),
    Refusal(
        name="bf16-over-fp32",
        shard=_cast(torch.bfloat16),
        options={"dtype": torch.float32},
        says=("float32", "bfloat16", "garbage"),
    ),
    Refusal(
        name="fp16-over-bf16-by-fsdp2", shard=_cast_by_fsdp2(torch.float16), says=("float16", "bfloat16", "FSDP2 would")
    ),
    Refusal(
        name="bf16-over-fp32-by-fsdp2",
        shard=_cast_by_fsdp2(torch.bfloat16),
        quant={"quant_storage": torch.float32},
        says=("float32", "bfloat16", "FSDP2 would"),
    ),
    Refusal(
        name="norms-of-another-dtype",
        shard=FSDP1(units="block", use_orig_params=True),
        quant={"quant_storage": torch.float32},
        says=("norms", "bfloat16", "float32", "units='auto'"),
    ),
    Refusal(name="trainable-among-frozen", shard=FSDP1(units="block"), says=("adapters", "use_orig_params=True")),
    Refusal(
        name="dora-in-its-own-unit",
        lora={"use_dora": True},
        options={"placement": "replicated"},
        says=("use_dora", "use_orig_params=True"),
    ),
    Refusal(
        name="tokens-in-4-bits",
        shard=FSDP2(),
        lora={"target_modules": ["q_proj"], "trainable_token_indices": {"up_proj": [3]}},
        says=("trainable_token_indices", "model.layers.0.mlp.up_proj", "4 bits", "skip_modules"),
    ),
    Refusal(
        name="token-indices-in-their-own-unit",
        lora={"trainable_token_indices": [3]},
        says=("trainable_token_indices", "use_orig_params=True"),
    ),
    Refusal(
        name="packed-parameters",
        shard=FSDP2(),
        lora={"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]},
        says=("target_parameters", "goes to 4 bits", "skip_modules"),
    ),
    Refusal(
        name="parameters-in-fsdp1",
        shard=FSDP1(use_orig_params=True),
        lora={"target_modules": [], "target_parameters": ["embed_tokens.weight"]},
        says=("model.embed_tokens.weight", "FSDP1 does not let it", "shard=FSDP2()"),
    ),
    Refusal(
        name="saved-in-4-bits",
        lora={"modules_to_save": ["mlp"]},
        says=("modules_to_save", "model.layers.0.mlp", "4 bits", "skip_modules"),
    ),
    Refusal(name="no-target-in-shards", shard=FSDP2(), lora={"target_modules": ["nowhere"]}, says=("'nowhere'",)),
    Refusal(name="pissa", lora={"init_lora_weights": "pissa"}, says=("'pissa'", "16-bit")),
    Refusal(name="olora", lora={"init_lora_weights": "olora"}, says=("'olora'", "16-bit")),
    Refusal(name="no-target", lora={"target_modules": ["nowhere"]}, says=("'nowhere'", "q_proj")),
    Refusal(name="no-skip", quant={"skip_modules": ("nowhere",)}, says=("'nowhere'", "q_proj")),
)


def refused_on_this_rank(checkpoint: Path) -> dict[str, str]:
    """What every refusal says here, after none of them has read a weight; then the same ranks build and run a model."""
    import surgery
    from surgery.checkpoint import Reader
    from tests.helpers.reads import count_reads

    reads, Reader.read_bytes = count_reads()  # type: ignore[method-assign]  # of this process alone
    messages = {refusal.name: _message(checkpoint, refusal) for refusal in REFUSALS}
    if reads:
        raise AssertionError(f"weights were read: {reads}")
    messages.update(refused_misfits(checkpoint, FSDP2()))
    for kind in (FSDP1, FSDP2):
        with surgery.qlora(checkpoint, shard=kind(), report=surgery.Report()) as model:
            logits = model(input_ids=torch.arange(8).view(1, 8)).logits
            messages[kind.__name__] = str(logits.float().logsumexp(-1).mean().item())
    return messages


def _message(checkpoint: Path, refusal: Refusal) -> str:
    from peft import LoraConfig

    import patches
    import surgery

    lora = LoraConfig(**{"r": 2, "target_modules": "all-linear", **refusal.lora})
    try:
        with _promised(refusal.world_size):
            surgery.qlora(
                checkpoint,
                quant=surgery.Quant(**refusal.quant),
                lora=lora,
                shard=refusal.shard,
                report=surgery.Report(),
                **refusal.options,
            )
    except surgery.ConfigError as error:
        return f"{error} {patches.active() or ''}".strip()
    raise AssertionError(f"{refusal.name} was not refused")


@contextlib.contextmanager
def _promised(world_size: str | None) -> Iterator[None]:
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = world_size or before
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = before
