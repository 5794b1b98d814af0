"""What happened while a model was built: seconds and peak memory per phase, and a progress bar on rank 0."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["Phase", "Report", "anonymous_memory", "sample_peak"]

T = TypeVar("T")

#: Seconds between two looks at the process's memory. A layer takes milliseconds to seconds.
SAMPLE_PERIOD = 0.005


def anonymous_memory() -> int:
    """Bytes of resident memory of this process that no file backs (`RssAnon`); 0 where the kernel does not say."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            lines = [line for line in status if line.startswith("RssAnon:")]
    except OSError:
        return 0
    return int(lines[0].split()[1]) * 1024 if lines else 0


@dataclass(kw_only=True)
class Phase:
    """One phase, in bytes and seconds. Host memory is anonymous memory, device memory what torch has allocated."""

    name: str
    seconds: float = 0.0
    host_before: int = 0
    host_peak: int = 0
    device_peak: int = 0


@contextlib.contextmanager
def sample_peak(phase: Phase) -> Iterator[None]:
    """Keep `phase.host_peak` at the highest anonymous memory seen while the block runs, from a thread."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_PERIOD):
            phase.host_peak = max(phase.host_peak, anonymous_memory())

    thread = threading.Thread(target=look, name="surgery-memory", daemon=True)
    phase.host_before = phase.host_peak = anonymous_memory()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        phase.host_peak = max(phase.host_peak, anonymous_memory())


@dataclass(kw_only=True)
class Report:
    """Phases in the order in which they ended. `show_progress` draws a bar for layer loops: for rank 0."""

    show_progress: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    phases: list[Phase] = field(default_factory=list)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Measure a block. Phases do not nest."""
        phase = Phase(name=name)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            with sample_peak(phase):
                yield phase
        finally:
            if on_cuda:
                torch.cuda.synchronize(self.device)
                phase.device_peak = torch.cuda.max_memory_allocated(self.device)
            phase.seconds = time.perf_counter() - start
            self.phases.append(phase)

    def track(self, items: Sequence[T], *, describe: Callable[[T], str]) -> Iterator[T]:
        """The items, with a progress bar that names the current one."""
        if not self.show_progress:
            yield from items
            return
        from tqdm.auto import tqdm

        with tqdm(items, desc="Loading", unit="layer", leave=False, dynamic_ncols=True) as bar:
            for item in bar:
                bar.set_postfix_str(describe(item), refresh=False)
                yield item

    def as_dict(self) -> dict[str, dict[str, float]]:
        """`{phase: {seconds, host_before, host_peak, device_peak}}`, bytes."""
        return {
            phase.name: {
                "seconds": round(phase.seconds, 3),
                "host_before": phase.host_before,
                "host_peak": phase.host_peak,
                "device_peak": phase.device_peak,
            }
            for phase in self.phases
        }
