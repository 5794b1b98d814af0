"""The verdict on a plan: whether it fits in memory, options that would make it fit, and the predicted peaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from surgery.errors import ConfigError
from surgery.planning.advice import Advice, advise, advise_all, command
from surgery.planning.plan import MemoryPlan
from surgery.telemetry.numbers import say_size

__all__ = ["as_dict", "check_fits", "fits_gpu", "free_memory", "predictions", "say"]

#: Device memory that torch's allocator does not count: the CUDA context, cuBLAS, NCCL. Round, and on the safe side.
OUTSIDE_ALLOCATOR = 768 << 20


def fits_gpu(plan: MemoryPlan, gpu_memory: int) -> bool:
    """Whether every rank stays within a GPU of `gpu_memory` bytes, of which the driver and NCCL take their part."""
    return plan.device_peak + OUTSIDE_ALLOCATOR <= gpu_memory


def free_memory(device: torch.device) -> int:
    """Bytes that torch's allocator can still give out on this GPU, in this process."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, allowed) + reserved - allocated


def check_fits(plan: MemoryPlan, available_device_bytes: int) -> None:
    """Raise `ConfigError` if a rank would need more than torch's allocator can still get, naming what would fit.

    To be called on every rank with the least that any of them has, so that all refuse or none.
    """
    if plan.device_peak <= available_device_bytes:
        return
    ranks, figures = max(plan.classes, key=lambda found: found[1].device_peak)
    when = "to load" if figures.load.device_peak == figures.device_peak else "to train"
    raise ConfigError(
        f"{ranks.label} would need {say_size(figures.device_peak)} of device memory {when}, but "
        f"{say_size(available_device_bytes)} is free: {_said(advise(plan, available_device_bytes))}"
    )


def _said(advice: Advice | None) -> str:
    if advice is None:
        return "nothing that surgery plan knows of would make it fit; use a smaller model or GPUs with more memory"
    needed = f", which need {advice.install}" if advice.install else ""
    return f"it would fit with {' and '.join(advice.options)} ({say_size(advice.device_peak)}){needed}"


def predictions(plan: MemoryPlan, rank: int) -> dict[str, tuple[int, int]]:
    """`{"load": (host, device), "train": (host, device)}`: peaks of `rank` in bytes above what is held before loading.

    On the host of anonymous memory.

    For `Report.predict`, which is to be called for both before loading begins.
    """
    figures = plan.of_rank(rank)
    found = {"load": (figures.load.anonymous_peak, figures.load.device_peak)}
    if figures.train is not None:
        found["train"] = (figures.train.host_peak - figures.train.offloaded, figures.train.device_peak)
    return found


def say(plan: MemoryPlan, gpu_memory: int | None, model: str = "MODEL") -> Iterator[str]:
    """The verdict, a line each, with the commands that fine-tune `model` so; nothing without `gpu_memory`."""
    if gpu_memory is None:
        return
    needed = f"{say_size(plan.device_peak)}, and {say_size(OUTSIDE_ALLOCATOR)} for the driver, cuBLAS and NCCL"
    if fits_gpu(plan, gpu_memory):
        yield f"It fits {say_size(gpu_memory)}: {needed}."
        return
    yield f"It does not fit {say_size(gpu_memory)}: {needed}."
    found = list(advise_all(plan, gpu_memory - OUTSIDE_ALLOCATOR))
    for advice in found:
        yield f"  It would fit with {' '.join(advice.options)}: {say_size(advice.device_peak)} on the device."
        if advice.install is not None:
            yield f"    {advice.install}"
        yield f"    {command(advice.plan, model)}"
    if not found:
        yield "  No option known here makes it fit: it takes GPUs with more memory, or a smaller model."


def as_dict(plan: MemoryPlan, gpu_memory: int | None, model: str = "MODEL") -> dict[str, Any]:
    """The verdict for JSON; `fits` is None without `gpu_memory`."""
    if gpu_memory is None:
        return {"gpu_memory": None, "fits": None, "would_fit_with": []}
    fits = fits_gpu(plan, gpu_memory)
    advice = [
        {
            "options": found.options,
            "device_peak": found.device_peak,
            "install": found.install,
            "command": command(found.plan, model),
        }
        for found in (() if fits else advise_all(plan, gpu_memory - OUTSIDE_ALLOCATOR))
    ]
    return {"gpu_memory": gpu_memory, "fits": fits, "would_fit_with": advice}
