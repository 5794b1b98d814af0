"""Profile of a training step: operators, kernels, and Python."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # declared in another module's stub
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

__all__ = ["Kernels", "kernels", "profile"]

STEPS = 3
ROWS = 45


def profile(step: Callable[[], float], *, synchronize: Callable[[], None], device: torch.device) -> str:
    """Profile `STEPS` steps with torch's profiler, then again with Python's, since each slows them down."""
    plain = _seconds(step, synchronize)
    with_operators, operators = _operators(step, synchronize, device)
    with_calls, calls = _calls(step, synchronize)
    return "\n\n".join(
        (
            f"seconds a step: {plain:.4f}; profiled by torch {with_operators:.4f}, by Python {with_calls:.4f}",
            operators,
            "Python functions of the main thread (backward runs in another one on a GPU)",
            calls,
        )
    )


def _seconds(step: Callable[[], float], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return (time.perf_counter() - start) / STEPS


def _operators(step: Callable[[], float], synchronize: Callable[[], None], device: torch.device) -> tuple[float, str]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = _seconds(step, synchronize)
    averages = profiler.key_averages()
    tables = [averages.table(sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=70)]
    if device.type == "cuda":
        tables.append(averages.table(sort_by="self_device_time_total", row_limit=ROWS, max_name_column_width=70))
        tables.insert(0, _busy(profiler.events() or [], seconds))
    return seconds, "\n\n".join(tables)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Work of a GPU in one step. busy: seconds with any kernel running; useful: but NCCL's, which also wait."""

    busy: float
    useful: float
    launches: int


def kernels(step: Callable[[], object], *, synchronize: Callable[[], None]) -> Kernels:
    """Profile one step for what this process runs on GPUs."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize()
    return _kernels(profiler.events() or [], steps=1)


def _kernels(events: Iterable[FunctionEvent], *, steps: int) -> Kernels:
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        # Skip annotation spans, which only carry a name for the kernels inside.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    computing = [span for span in spans if "nccl" not in span[2].lower()]
    busy, useful = (_covered(each) / 1e6 / steps for each in (spans, computing))
    return Kernels(busy=busy, useful=useful, launches=len(spans) // steps)


def _busy(events: Iterable[FunctionEvent], seconds: float) -> str:
    found = _kernels(events, steps=STEPS)
    return (
        f"the GPU was busy for {found.busy:.4f} s a step ({found.busy / seconds:.0%}), {found.useful:.4f} s "
        f"({found.useful / seconds:.0%}) without NCCL; {found.launches} kernels and copies a step"
    )


def _covered(spans: Iterable[tuple[float, float, str]]) -> float:
    """Length of the union of the spans `(start, end, name)`, in their unit."""
    total, reached = 0.0, float("-inf")
    for start, end, _ in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _calls(step: Callable[[], float], synchronize: Callable[[], None]) -> tuple[float, str]:
    profiler = cProfile.Profile()
    profiler.enable()
    seconds = _seconds(step, synchronize)
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(ROWS)
    return seconds, text.getvalue()
