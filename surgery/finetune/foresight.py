"""The memory plan of a job, which also finds out what the checkpoint and the adapters would be refused for."""

from __future__ import annotations

from typing import Any

import torch
from trl import get_peft_config

from surgery.checkpoint.peek import peek
from surgery.config import DDP, Quant
from surgery.errors import ConfigError
from surgery.finetune.parser import Request
from surgery.planning.arguments import parse_mesh, parse_shard
from surgery.planning.plan import MemoryPlan, plan
from surgery.planning.training import Training
from surgery.step.graphs import SHAPES
from surgery.step.kernels import chosen_kernels

__all__ = ["foresee"]


def foresee(
    request: Request, *, world_size: int, device: str, checkpointing: bool, cpu_offload: bool = False
) -> MemoryPlan | None:
    """The plan, of headers alone; None for a base model that is not in 4 bits, which is not planned.

    checkpointing: whether blocks are recomputed in backward. cpu_offload: whether shards wait on the CPU.
    Raises `CheckpointError`, `ConfigError` and `SelectorError` for what could not be loaded or adapted.
    """
    model, values = request.model, request.values
    if not model.load_in_4bit:
        return None
    if not model.use_peft:
        raise ConfigError(
            "4-bit weights cannot be trained without adapters: use --use-peft true, or --load-in-4bit false"
        )
    adapter = request.options.adapter
    revision = None if model.model_revision == "main" else model.model_revision
    checkpoint = peek(request.name, revision=revision)
    dtype = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype or "float32")
    training = Training(
        # A pair is two samples.
        batch=values["per_device_train_batch_size"] * (2 if request.preferences else 1),
        seq=values["max_length"] or 1024,
        optimizer="sgd" if values["optim"] == "sgd" else "adamw",
        checkpointing=checkpointing,
        offload=request.options.activation_offloading,
        kernels=chosen_kernels(request.options.kernels),
        loss="trl",
        graphs=SHAPES if request.options.cuda_graphs else 0,
    )
    return plan(
        checkpoint,
        world_size=world_size,
        quant=Quant(
            model.bnb_4bit_quant_type,  # type: ignore[arg-type]  # a choice of TRL's
            double_quant=model.use_bnb_nested_quant,
            quant_storage=getattr(torch, model.bnb_4bit_quant_storage or "uint8"),
            experts=request.options.experts == "4bit",
        ),
        lora=get_peft_config(model) if adapter is None else None,  # type: ignore[arg-type]
        adapter=adapter,
        shard=_shard(request, cpu_offload=cpu_offload) if world_size > 1 else None,
        dtype=dtype,
        device=device,
        training=training,
    )


def _shard(request: Request, *, cpu_offload: bool) -> Any:
    version = request.options.fsdp
    if version == "none":
        return DDP()
    return parse_shard(version, mesh=parse_mesh(request.options.mesh), cpu_offload=cpu_offload)
