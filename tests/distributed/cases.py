"""The variations that are compared with upstream's single process, and the tiny models that they run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed.exactness import Case
from tests.helpers.models import save_tiny

__all__ = ["CASES", "HYBRID", "OFFLOADED", "save_models"]

#: Dimensions that neither two nor three ranks divide: heads of 14, an inner size of 102.
ODD: dict[str, Any] = {"hidden_size": 56, "intermediate_size": 102, "head_dim": 14, "vocab_size": 97}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {"attention_bias": True}),
    "odd": ("llama", ODD),
}

CASES = [
    Case(name="plain"),
    Case(name="fp4", quant={"quant_type": "fp4"}),
    Case(name="single-quant", quant={"double_quant": False}),
    Case(name="blocksize-128", quant={"blocksize": 128}),
    Case(name="fp4-single-128", quant={"quant_type": "fp4", "double_quant": False, "blocksize": 128}),
    Case(name="storage-bf16", quant={"quant_storage": torch.bfloat16}),
    Case(name="storage-fp16", quant={"quant_storage": torch.float16}),
    Case(name="biased", model="biased"),
    Case(name="biased-storage-bf16", model="biased", quant={"quant_storage": torch.bfloat16}),
    Case(name="tied", model="tied"),
    Case(name="odd", model="odd"),
    Case(name="odd-storage-bf16", model="odd", quant={"quant_storage": torch.bfloat16}),
    Case(name="orig-params", shard={"use_orig_params": True}),
    Case(
        name="orig-params-storage-bf16",
        quant={"quant_storage": torch.bfloat16},
        shard={"use_orig_params": True},
    ),
    Case(name="tied-orig-params", model="tied", shard={"use_orig_params": True}),
    Case(name="block-units", shard={"use_orig_params": True, "units": "block"}),
    Case(name="shard-grad-op", shard={"strategy": "shard-grad-op"}),
    Case(name="shard-grad-op-orig-params", shard={"strategy": "shard-grad-op", "use_orig_params": True}),
    Case(name="no-shard", shard={"strategy": "no-shard"}),
    Case(name="no-shard-orig-params", shard={"strategy": "no-shard", "use_orig_params": True}),
    Case(name="checkpointing", checkpointing="non-reentrant"),
    Case(name="checkpointing-orig-params", checkpointing="non-reentrant", shard={"use_orig_params": True}),
    Case(name="checkpointing-reentrant", checkpointing="reentrant"),
    Case(name="replicated", placement="replicated"),
]

#: For four ranks.
HYBRID = [
    Case(name="hybrid", shard={"strategy": "hybrid-shard", "mesh": (2, 2)}),
    Case(name="hybrid-orig-params", shard={"strategy": "hybrid-shard", "mesh": (2, 2), "use_orig_params": True}),
]

#: Parameters move between an accelerator and the CPU.
OFFLOADED = [
    Case(name="cpu-offload", shard={"cpu_offload": True}),
    Case(name="cpu-offload-orig-params", shard={"cpu_offload": True, "use_orig_params": True}),
    Case(name="cpu-offload-storage-bf16", quant={"quant_storage": torch.bfloat16}, shard={"cpu_offload": True}),
    Case(name="cpu-offload-tied", model="tied", shard={"cpu_offload": True}),
    Case(name="cpu-offload-replicated", placement="replicated", shard={"cpu_offload": True}),
]


def save_models(root: Path) -> dict[str, Path]:
    """A checkpoint of each model that the cases name, in folders of `root`."""
    return {name: save_tiny(root / name, kind, **changes) for name, (kind, changes) in MODELS.items()}
