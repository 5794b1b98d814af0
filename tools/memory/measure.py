"""Measure the memory of one rank while it loads a checkpoint in one of this project's ways or the stock way."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import surgery
from surgery.quantizers.bnb import linear4bits
from surgery.telemetry.report import Report, anonymous_memory

__all__ = ["OURS", "WAYS", "Measured", "Sizes", "measure"]

#: Bytes that loading may use beyond weights and statistics: read-ahead buffers, temporaries of the quantization kernel,
#: adapters before they are sharded, threads, objects.
ALLOWANCE = 64 * 1024 * 1024

#: Imported before the memory used by imports is measured.
UPSTREAM = ("accelerate", "bitsandbytes", "peft", "transformers", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model's parts, in bytes.

    largest_layer: the part of the largest quantized module's 16-bit weight that a rank may hold. quant_states: tensors
    of all quant_states. kept: weights that this rank keeps, packed or not, until it is sharded or for good.
    """

    largest_layer: int
    quant_states: int
    kept: int

    @property
    def bound(self) -> int:
        """Maximum memory that loading may add on this rank to that of imports."""
        return self.largest_layer + self.quant_states + self.kept + ALLOWANCE


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Start and duration of a phase, in seconds, and its peak of anonymous memory above that of imports."""

    start: float
    seconds: float
    peak: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurement of one rank, in bytes.

    imports: anonymous memory before loading. resident: peak of resident memory, which includes imports and mapped
    files. sizes: None for the stock way.
    """

    imports: int
    resident: int
    phases: dict[str, Phase]
    sizes: Sizes | None

    @property
    def loading(self) -> dict[str, Phase]:
        """The phases until the model is filled: before FSDP1 wraps it; after FSDP2 has sharded it."""
        names = list(self.phases)
        last = names.index("install") if "install" in names else len(names) - 1
        return {name: self.phases[name] for name in names[: last + 1]}

    @property
    def peak(self) -> int:
        """Highest peak of the loading phases."""
        return max(phase.peak for phase in self.loading.values())

    @property
    def seconds(self) -> float:
        """Seconds from the start of the first loading phase to the end of the last; some overlap."""
        phases = self.loading.values()
        return max(phase.start + phase.seconds for phase in phases) - min(phase.start for phase in phases)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """Restore a measurement from the result of `as_dict`."""
        phases = {name: Phase(**phase) for name, phase in values["phases"].items()}
        sizes = None if values["sizes"] is None else Sizes(**values["sizes"])
        return cls(**{**values, "phases": phases, "sizes": sizes})


def _load_for_fsdp1(checkpoint: Path, report: Report) -> Sizes:
    """Load for FSDP1: rank 0 keeps everything and broadcasts it."""
    on_rank0 = dist.get_rank() == 0
    return _load_ours(checkpoint, report, surgery.FSDP1(), kept=1.0 if on_rank0 else 0.0, held=1.0)


def _load_for_fsdp2(checkpoint: Path, report: Report) -> Sizes:
    """Load for FSDP2: every rank keeps its shard, and holds only its part of any layer."""
    part = 1 / dist.get_world_size()
    return _load_ours(checkpoint, report, surgery.FSDP2(), kept=part, held=part)


def _load_ours(
    checkpoint: Path, report: Report, shard: surgery.FSDP1 | surgery.FSDP2, *, kept: float, held: float
) -> Sizes:
    """Load in the default placement of `shard`. kept, held: this rank's part of all weights, and of a 16-bit layer."""
    from peft import LoraConfig

    opened = surgery.Checkpoint.open(checkpoint)
    lora = LoraConfig(r=8, target_modules="all-linear")
    model = surgery.qlora(opened, lora=lora, shard=shard, report=report)
    sizes = _sizes(model, opened, kept=kept, held=held)
    surgery.release(model)
    return sizes


def _sizes(model: torch.nn.Module, checkpoint: surgery.Checkpoint, *, kept: float, held: float) -> Sizes:
    states = [layer.quant_state for layer in linear4bits(model) if layer.quant_state is not None]
    elements = [state.shape.numel() for state in states]
    statistics = [value for state in states for value in state.as_dict().values() if isinstance(value, torch.Tensor)]
    unquantized = sum(entry.nbytes for entry in checkpoint.index.values())
    packed = unquantized - 2 * sum(elements) + sum(elements) // 2
    return Sizes(
        largest_layer=int(2 * max(elements) * held),
        quant_states=sum(tensor.nbytes for tensor in statistics),
        kept=int(packed * kept),
    )


def _load_stock(checkpoint: Path, report: Report) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    with report.phase("from_pretrained"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config, dtype=torch.bfloat16, trust_remote_code=False
        )


#: Way -> loader; all use bfloat16, nf4 and double quantization.
WAYS: dict[str, Callable[[Path, Report], Sizes | None]] = {
    "rank0-cpu": _load_for_fsdp1,
    "sharded": _load_for_fsdp2,
    "stock": _load_stock,
}

#: The ways of this project, each named after its placement.
OURS = ("rank0-cpu", "sharded")


def measure(way: str, checkpoint: Path) -> Measured:
    """Load `checkpoint` on this rank in one of `WAYS`; to be called on all ranks alike."""
    for name in UPSTREAM:
        importlib.import_module(name)
    report = Report()
    imports = anonymous_memory()
    sizes = WAYS[way](checkpoint, report)
    phases: dict[str, Phase] = {}
    for phase in report.phases:
        # The first of a name: a model that was sharded on meta has a second phase `shard`, after it was filled.
        found = Phase(start=phase.start, seconds=phase.seconds, peak=phase.host_peak - imports)
        phases.setdefault(phase.name, found)
    return Measured(
        imports=imports,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        phases=phases,
        sizes=sizes,
    )
