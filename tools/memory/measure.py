"""One rank loads a checkpoint, in this project's way or in the stock way, and measures its own memory."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.quantizers.bnb import linear4bits
from surgery.report import Report, anonymous_memory

__all__ = ["LOADING", "WAYS", "Measured", "Sizes", "measure"]

#: The phases in which weights are read and quantized; adapting and sharding come after.
LOADING = ("replace", "load+quantize+relocate")

#: What loading may take beyond weights and statistics.
SLACK = 64 * 1024 * 1024

#: Imported before the memory that imports take is looked at.
UPSTREAM = ("accelerate", "bitsandbytes", "peft", "transformers", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model is made of, in bytes.

    largest_layer: the 16-bit weight of its largest quantized module. quant_states: all tensors of all of them.
    packed_model: all weights as they wait to be sharded, packed or not.
    """

    largest_layer: int
    quant_states: int
    packed_model: int

    def bound(self, rank: int) -> int:
        """What a rank may add to the memory of its imports while it loads."""
        everywhere = self.largest_layer + self.quant_states + SLACK
        return everywhere + self.packed_model if rank == 0 else everywhere


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds, and the most anonymous memory above what imports took."""

    seconds: float
    peak: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank measured. imports: anonymous memory right before. resident: peak of all resident memory, which
    counts imports and mapped files too. sizes: None for the stock way.
    """

    imports: int
    resident: int
    phases: dict[str, Phase]
    sizes: Sizes | None

    def peak(self, names: tuple[str, ...] | None = None) -> int:
        """The highest peak of the named phases, or of all."""
        return max(phase.peak for name, phase in self.phases.items() if names is None or name in names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """What `as_dict` gave."""
        phases = {name: Phase(**phase) for name, phase in values["phases"].items()}
        sizes = None if values["sizes"] is None else Sizes(**values["sizes"])
        return cls(**{**values, "phases": phases, "sizes": sizes})


def _load_ours(checkpoint: Path, report: Report) -> Sizes:
    from peft import LoraConfig

    opened = surgery.Checkpoint.open(checkpoint)
    model = surgery.qlora(
        opened,
        lora=LoraConfig(r=8, target_modules="all-linear"),
        placement="rank0-cpu",
        shard=surgery.FSDP1(),
        report=report,
    )
    sizes = _sizes(model, opened)
    surgery.release(model)
    return sizes


def _sizes(model: torch.nn.Module, checkpoint: surgery.Checkpoint) -> Sizes:
    states = [layer.quant_state for layer in linear4bits(model) if layer.quant_state is not None]
    elements = [state.shape.numel() for state in states]
    statistics = [value for state in states for value in state.as_dict().values() if isinstance(value, torch.Tensor)]
    unquantized = sum(entry.nbytes for entry in checkpoint.index.values())
    return Sizes(
        largest_layer=2 * max(elements),
        quant_states=sum(tensor.nbytes for tensor in statistics),
        packed_model=unquantized - 2 * sum(elements) + sum(elements) // 2,
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
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)


#: Both in bfloat16, with nf4 and double quantization.
WAYS: dict[str, Callable[[Path, Report], Sizes | None]] = {"surgery": _load_ours, "stock": _load_stock}


def measure(way: str, checkpoint: Path) -> Measured:
    """Load `checkpoint` on this rank in one of `WAYS`. With surgery's all ranks have to call it."""
    for name in UPSTREAM:
        importlib.import_module(name)
    report = Report()
    imports = anonymous_memory()
    sizes = WAYS[way](checkpoint, report)
    return Measured(
        imports=imports,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        phases={phase.name: Phase(seconds=phase.seconds, peak=phase.host_peak - imports) for phase in report.phases},
        sizes=sizes,
    )
