"""Whether a plan fits the memory that there is, and what it says to whoever carries it out."""

from __future__ import annotations

import torch

from surgery.errors import ConfigError
from surgery.planning.advice import Advice, advise
from surgery.planning.allowances import OUTSIDE_ALLOCATOR
from surgery.planning.plan import MemoryPlan
from surgery.telemetry.numbers import say_size

__all__ = ["check_fits", "fits_gpu", "free_memory", "predictions"]


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
        f"{say_size(available_device_bytes)} is free: {_say(advise(plan, available_device_bytes))}"
    )


def _say(advice: Advice | None) -> str:
    if advice is None:
        return "nothing that surgery plan knows of would make it fit; use a smaller model or GPUs with more memory"
    return f"it would fit with {' and '.join(advice.options)} ({say_size(advice.device_peak)})"


def predictions(plan: MemoryPlan, rank: int) -> dict[str, tuple[int, int]]:
    """`{"load": (host, device), "train": (host, device)}`: peaks of `rank` in bytes above what is held before loading.
    Of the host what is anonymous memory.

    For `Report.predict`, which is to be called for both before loading begins.
    """
    figures = plan.of_rank(rank)
    found = {"load": (figures.load.anonymous_peak, figures.load.device_peak)}
    if figures.train is not None:
        found["train"] = (figures.train.host_peak, figures.train.device_peak)
    return found
