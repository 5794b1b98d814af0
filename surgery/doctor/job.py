"""The job that a diagnosis is made for: settings, and the versions, verdicts, device and plans that go with them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch

import model_surgery_patches as patches
import surgery
from surgery.doctor.diagnosis import Job
from surgery.doctor.settings import EXPERTS, Settings, read_settings
from surgery.errors import SurgeryError

__all__ = ["BUNDLE", "THIS_RUN", "examine", "make_plans", "module_file"]

DISTRIBUTIONS = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes")

#: The bundle of `surgery.low_memory`, which is applied as a whole or not at all.
BUNDLE = "low-memory"

#: The remedy of a script that does not use `surgery.low_memory` itself, while it runs.
THIS_RUN = "surgery.low_memory() of this run"

#: That bundle, the patches that bound and sharded models carry, and those that anybody may add.
WATCHED = (BUNDLE, "qlora-low-memory", "accelerate.*", "peft.*")

#: Ranks where FSDP is asked for, and nothing says of how many.
SEVERAL = 2


def examine(
    script: Path | None,
    arguments: Sequence[str],
    *,
    runs: bool,
    config_file: Path | None,
    world_size: int | None,
    device: Literal["cuda", "cpu"] | None,
    gpu_memory: int | None,
    apply: Sequence[str],
    experts: str | None = None,
) -> tuple[Job, dict[str, Any]]:
    """The job, without its plans, and the verdicts on the patches that concern it. Imports what they patch.

    runs: whether the script is to be run. experts: the 4-bit type of fused experts, if it is asked for here.
    """
    if config_file is None and "RANK" not in os.environ:
        config_file = _default_config_file()  # `accelerate launch` hands it to ranks in their environment
    settings = read_settings(os.environ, config_file=config_file, script=script, arguments=arguments, experts=experts)
    here: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    device = device or ("cpu" if settings.is_on("use_cpu") else here)
    if device == "cuda" == here and gpu_memory is None:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory
    verdicts = {patch_id: patches.verdict(patch_id) for patch_id in patches.select(*WATCHED)}
    applied = [word.strip() for word in os.environ.get("PATCHES_APPLY", "").split(",") if word.strip()]
    source = settings.found.get("low_memory")
    job = Job(
        settings=settings,
        world_size=world_size or settings.number("world_size") or _assumed(settings, device),
        is_assumed=bool(settings.fsdp_version) and world_size is settings.number("world_size") is None,
        device=device,
        is_here=device in (here, "cpu"),
        script=f"{script.name} ..." if script is not None and arguments else getattr(script, "name", "SCRIPT"),
        versions=dict(_versions()),
        verdicts={patch_id: str(found) for patch_id, found in verdicts.items()},
        applied=tuple(patches.select(*applied, *apply)) if applied or apply else (),
        bundle=tuple(patches.select(BUNDLE)),
        low_memory=f"surgery.low_memory() in {source.source}" if source is not None else THIS_RUN if runs else "",
        gpu_memory=gpu_memory,
    )
    return job, verdicts


def module_file(name: str) -> Path | None:
    """The source of a module that `-m` would run; None if there is none."""
    try:
        found = util.find_spec(name)
    except ImportError:
        return None
    if found is not None and found.submodule_search_locations is not None:
        return module_file(f"{name}.__main__")
    return None if found is None or found.origin is None else Path(found.origin)


def make_plans(job: Job) -> tuple[Job, str]:
    """The job with its plans, or the reason why it has none; that is "" where there was nothing to plan."""
    settings = job.settings
    if not settings.get("model") or not (settings.storage or settings.is_on("use_peft")):
        return job, ""
    try:
        common = _common(settings, job.device)
        plan = surgery.plan(world_size=job.world_size, shard=_shard(job), training=_training(settings), **common)
        whole = plan if job.world_size == 1 else surgery.plan(world_size=1, training=None, **common)
    except SurgeryError as error:
        return job, str(error).splitlines()[0]
    return replace(job, plan=plan, whole=whole), ""


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in DISTRIBUTIONS:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _default_config_file() -> Path | None:
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    return path if path.is_file() else None


def _assumed(settings: Settings, device: str) -> int:
    """A number of ranks where nothing says: of GPUs here, or `SEVERAL`, where FSDP is asked for."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return max(gpus, SEVERAL) if settings.fsdp_version else 1


def _dtype(word: str) -> torch.dtype:
    found = getattr(torch, word, None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _common(settings: Settings, device: str) -> dict[str, Any]:
    """Arguments of `surgery.plan` that do not depend on how ranks share the model."""
    from peft import LoraConfig

    targets = settings.get("lora_target_modules") or "all-linear"
    modules = targets if isinstance(targets, list) or targets == "all-linear" else [targets]
    quant: Any = None
    if settings.storage:
        kind: Any = settings.word("bnb_4bit_quant_type") or "fp4"  # bitsandbytes' default
        double = settings.is_on("use_bnb_nested_quant")
        experts: Any = settings.word(EXPERTS) or False
        quant = surgery.Quant(kind, double_quant=double, quant_storage=_dtype(settings.storage), experts=experts)
    elif settings.is_packed:
        quant = surgery.Quant8(quant_storage=torch.int8)
    return {
        "checkpoint": str(settings.get("model")),
        "quant": quant,
        "lora": LoraConfig(r=settings.number("lora_r") or 8, target_modules=modules, task_type="CAUSAL_LM"),
        "dtype": _dtype(settings.word("dtype")),
        "device": device,
    }


def _shard(job: Job) -> Any:
    offloads = job.settings.is_on("fsdp.offload_params") and job.device == "cuda"
    if job.fsdp == 2:
        return surgery.FSDP2(mesh=job.settings.mesh, cpu_offload=offloads)
    if job.fsdp == 1:
        return surgery.FSDP1(cpu_offload=offloads)
    return surgery.DDP() if job.world_size > 1 else None


def _training(settings: Settings) -> surgery.Training:
    recomputes = settings.is_on("gradient_checkpointing") or settings.is_on("fsdp.activation_checkpointing")
    return surgery.Training(
        batch=settings.number("per_device_train_batch_size") or 1,
        seq=settings.number("max_length") or 1024,
        optimizer="sgd" if "sgd" in settings.word("optim") else "adamw",
        checkpointing=recomputes,
    )
