"""One rank loads a checkpoint and measures what a plan has predicted."""

from __future__ import annotations

import ctypes
import gc
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

import surgery
from memory.measure import UPSTREAM
from surgery.config import FSDP1, FSDP2, Placement
from surgery.telemetry.report import Report, anonymous_memory

#: glibc's `M_MMAP_THRESHOLD`, and a value of it.
MMAP_THRESHOLD, BYTES = -3, 1 << 18


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to load: what `surgery.plan` and `surgery.qlora` are told alike."""

    placement: Placement
    shard: FSDP1 | FSDP2 | None
    r: int = 16

    def options(self) -> dict[str, object]:
        from peft import LoraConfig

        lora = LoraConfig(r=self.r, target_modules="all-linear", task_type="CAUSAL_LM")
        return {"placement": self.placement, "shard": self.shard, "lora": lora}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Bytes: of anonymous memory above what imports took, at its peak; and of the checkpoint."""

    peak: int
    read: int


def load(folder: Path, case: Case) -> Loaded:
    """Load `folder` on this rank, as all ranks have to.

    A plan is of the memory that is in use. glibc keeps freed pieces below a threshold, which it raises by itself, in
    its heaps, as many as chance has it; with the threshold fixed they are given back.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, BYTES)
    for name in UPSTREAM:
        importlib.import_module(name)
    gc.collect()
    report, before = Report(), anonymous_memory()
    model = surgery.qlora(folder, report=report, device=torch.device("cpu"), **case.options())  # type: ignore[arg-type]
    surgery.release(model)
    return Loaded(peak=max(phase.host_peak for phase in report.phases) - before, read=report.bytes_read)
