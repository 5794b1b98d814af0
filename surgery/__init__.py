"""Build, quantize, adapt and shard models one layer at a time: QLoRA for models whose 4-bit weights exceed one GPU.

Names are imported on first use, so that `surgery --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery import errors

if TYPE_CHECKING:
    from surgery.adapters.folder import reserve
    from surgery.adapters.load import load_adapter
    from surgery.adapters.save import adapter_state, save_adapter
    from surgery.attestation.attest import attest, attesting
    from surgery.attestation.differences import AttestationError
    from surgery.bound import Bound, bind, fill
    from surgery.checkpoint import Checkpoint
    from surgery.comm.ranks import PeerError
    from surgery.config import DDP, FSDP1, FSDP2, Quant, Quant8
    from surgery.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        NotFilledError,
        PassError,
        QuantizerError,
        SelectorError,
        ShadowedPatchesWarning,
        StateError,
        SurgeryError,
        TraceError,
        WeightsMismatchError,
    )
    from surgery.integrations.low_memory import low_memory
    from surgery.passes.base import Pass
    from surgery.passes.lifetime import release
    from surgery.planning.plan import MemoryPlan, plan
    from surgery.planning.training import Training
    from surgery.recipe import qlora
    from surgery.state.state import TrainingState, load_state, save_state
    from surgery.step.checkpointing import checkpoint_activations
    from surgery.step.compiling import compile_blocks
    from surgery.step.fuse import fuse
    from surgery.step.graphs import capture
    from surgery.telemetry.report import Report
    from surgery.tracing.recorder import trace
    from surgery.writing.export import export
    from surgery.writing.merge import merge
    from surgery.writing.quantize import dequantize, quantize

__all__ = [
    "DDP",
    "FSDP1",
    "FSDP2",
    "AdapterError",
    "AttestationError",
    "Bound",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "MemoryPlan",
    "NotFilledError",
    "Pass",
    "PassError",
    "PeerError",
    "Quant",
    "Quant8",
    "QuantizerError",
    "Report",
    "SelectorError",
    "ShadowedPatchesWarning",
    "StateError",
    "SurgeryError",
    "TraceError",
    "Training",
    "TrainingState",
    "WeightsMismatchError",
    "adapter_state",
    "attest",
    "attesting",
    "bind",
    "capture",
    "checkpoint_activations",
    "compile_blocks",
    "dequantize",
    "export",
    "fill",
    "fuse",
    "load_adapter",
    "load_state",
    "low_memory",
    "merge",
    "plan",
    "qlora",
    "quantize",
    "release",
    "reserve",
    "save_adapter",
    "save_state",
    "trace",
]

_MODULES: dict[str, Sequence[str]] = {
    "surgery.adapters.load": ("load_adapter",),
    "surgery.adapters.save": ("adapter_state", "save_adapter"),
    "surgery.attestation.attest": ("attest", "attesting"),
    "surgery.bound": ("Bound", "bind", "fill"),
    "surgery.writing.export": ("export",),
    "surgery.writing.merge": ("merge",),
    "surgery.writing.quantize": ("dequantize", "quantize"),
    "surgery.integrations.low_memory": ("low_memory",),
    "surgery.passes.base": ("Pass",),
    "surgery.attestation.differences": ("AttestationError",),
    "surgery.checkpoint": ("Checkpoint",),
    "surgery.config": ("DDP", "FSDP1", "FSDP2", "Quant", "Quant8"),
    "surgery.comm.ranks": ("PeerError",),
    "surgery.errors": errors.__all__,
    "surgery.passes.lifetime": ("release",),
    "surgery.step.checkpointing": ("checkpoint_activations",),
    "surgery.planning.plan": ("MemoryPlan", "plan"),
    "surgery.planning.training": ("Training",),
    "surgery.recipe": ("qlora",),
    "surgery.step.compiling": ("compile_blocks",),
    "surgery.step.fuse": ("fuse",),
    "surgery.step.graphs": ("capture",),
    "surgery.state.state": ("TrainingState", "load_state", "save_state"),
    "surgery.telemetry.report": ("Report",),
    "surgery.adapters.folder": ("reserve",),
    "surgery.tracing.recorder": ("trace",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
