"""Build, quantize, adapt and shard models one layer at a time: QLoRA for models whose 4-bit weights exceed one GPU."""

from surgery.adapters import adapter_state, save_adapter
from surgery.checkpoint import Checkpoint
from surgery.config import FSDP1, PRECISIONS, Precision, Quant, precision
from surgery.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    PassError,
    SelectorError,
    SurgeryError,
    WeightsMismatchError,
)
from surgery.lifetime import release
from surgery.passes.checkpointing import checkpoint_activations
from surgery.recipe import qlora
from surgery.report import Report

__all__ = [
    "FSDP1",
    "PRECISIONS",
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "PassError",
    "Precision",
    "Quant",
    "Report",
    "SelectorError",
    "SurgeryError",
    "WeightsMismatchError",
    "adapter_state",
    "checkpoint_activations",
    "precision",
    "qlora",
    "release",
    "save_adapter",
]
