"""Whether a plan fits GPUs of a given size, and what would make it fit, as text and for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from surgery.planning.advice import Advice, advise_all
from surgery.planning.allowances import OUTSIDE_ALLOCATOR
from surgery.planning.fitting import fits_gpu
from surgery.planning.plan import MemoryPlan
from surgery.telemetry.numbers import say_size

__all__ = ["as_dict", "say"]


def say(plan: MemoryPlan, gpu_memory: int | None) -> Iterator[str]:
    """The verdict, a line each; nothing without `gpu_memory`."""
    if gpu_memory is None:
        return
    needed = f"{say_size(plan.device_peak)}, and {say_size(OUTSIDE_ALLOCATOR)} for the driver, cuBLAS and NCCL"
    if fits_gpu(plan, gpu_memory):
        yield f"It fits {say_size(gpu_memory)}: {needed}."
        return
    yield f"It does not fit {say_size(gpu_memory)}: {needed}."
    found = _advice(plan, gpu_memory)
    for advice in found:
        yield f"  It would fit with {' '.join(advice.options)}: {say_size(advice.device_peak)} on the device."
    if not found:
        yield "  No option known here makes it fit: it takes GPUs with more memory, or a smaller model."


def as_dict(plan: MemoryPlan, gpu_memory: int | None) -> dict[str, Any]:
    """For JSON: `fits` is None without `gpu_memory`."""
    if gpu_memory is None:
        return {"gpu_memory": None, "fits": None, "would_fit_with": []}
    fits = fits_gpu(plan, gpu_memory)
    advice = [] if fits else [asdict(found) for found in _advice(plan, gpu_memory)]
    return {"gpu_memory": gpu_memory, "fits": fits, "would_fit_with": advice}


def _advice(plan: MemoryPlan, gpu_memory: int) -> list[Advice]:
    return list(advise_all(plan, gpu_memory - OUTSIDE_ALLOCATOR))
