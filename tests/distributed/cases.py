"""The variations that are compared with upstream's single process, and the tiny models that they run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.fsdp import MixedPrecisionPolicy

from surgery.config import DDP, FSDP2
from surgery.sharding.fsdp2 import SHARDS_INTEGERS
from tests.distributed.exactness import Case, quantized, save_packed
from tests.helpers.models import save_tiny

__all__ = ["CASES", "OFFLOADED", "ON_FOUR", "ON_ONE", "ON_THREE", "ON_TWO", "save_models"]

#: Dimensions that neither two nor three ranks divide: heads of 14, an inner size of 102.
ODD: dict[str, Any] = {"hidden_size": 56, "intermediate_size": 102, "head_dim": 14, "vocab_size": 97}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {"attention_bias": True}),
    "odd": ("llama", ODD),
}

FSDP1_CASES = [
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
    Case(name="accumulation", accumulation=2),
]

FSDP2_CASES = [
    Case(name="fsdp2", kind=FSDP2),
    Case(name="fsdp2-fp4", kind=FSDP2, quant={"quant_type": "fp4"}),
    Case(name="fsdp2-single-quant", kind=FSDP2, quant={"double_quant": False}),
    Case(name="fsdp2-blocksize-128", kind=FSDP2, quant={"blocksize": 128}),
    Case(
        name="fsdp2-fp4-single-128",
        kind=FSDP2,
        quant={"quant_type": "fp4", "double_quant": False, "blocksize": 128},
    ),
    Case(name="fsdp2-storage-bf16", kind=FSDP2, quant={"quant_storage": torch.bfloat16}),
    Case(name="fsdp2-storage-fp16", kind=FSDP2, quant={"quant_storage": torch.float16}),
    Case(name="fsdp2-biased", kind=FSDP2, model="biased"),
    Case(name="fsdp2-biased-storage-bf16", kind=FSDP2, model="biased", quant={"quant_storage": torch.bfloat16}),
    Case(name="fsdp2-tied", kind=FSDP2, model="tied"),
    Case(name="fsdp2-odd", kind=FSDP2, model="odd"),
    Case(name="fsdp2-odd-storage-bf16", kind=FSDP2, model="odd", quant={"quant_storage": torch.bfloat16}),
    Case(name="fsdp2-kept-after-forward", kind=FSDP2, shard={"reshard_after_forward": False}),
    Case(name="fsdp2-checkpointing", kind=FSDP2, checkpointing="non-reentrant"),
    Case(name="fsdp2-checkpointing-reentrant", kind=FSDP2, checkpointing="reentrant"),
    Case(
        name="fsdp2-checkpointing-kept",
        kind=FSDP2,
        checkpointing="non-reentrant",
        shard={"reshard_after_forward": False},
    ),
    Case(name="fsdp2-replicated", kind=FSDP2, placement="replicated"),
    Case(name="fsdp2-replicated-tied", kind=FSDP2, model="tied", placement="replicated"),
    Case(name="fsdp2-accumulation", kind=FSDP2, accumulation=2),
    Case(
        name="fsdp2-mixed-precision",
        kind=FSDP2,
        quant={"quant_storage": torch.bfloat16},
        shard={"mixed_precision": MixedPrecisionPolicy(reduce_dtype=torch.float32)},
    ),
    Case(name="fsdp2-cpu-offload", kind=FSDP2, shard={"cpu_offload": True}),
    Case(
        name="fsdp2-cpu-offload-storage-bf16",
        kind=FSDP2,
        quant={"quant_storage": torch.bfloat16},
        shard={"cpu_offload": True},
    ),
    Case(name="fsdp2-cpu-offload-tied", kind=FSDP2, model="tied", shard={"cpu_offload": True}),
    Case(name="fsdp2-cpu-offload-replicated", kind=FSDP2, placement="replicated", shard={"cpu_offload": True}),
]

#: What FSDP2 of an older torch refuses to shard.
INTEGER_CASES = [
    Case(name="fsdp2-storage-uint8", kind=FSDP2, quant={"quant_storage": torch.uint8}),
    Case(name="fsdp2-biased-storage-uint8", kind=FSDP2, model="biased", quant={"quant_storage": torch.uint8}),
    Case(name="fsdp2-odd-storage-uint8", kind=FSDP2, model="odd", quant={"quant_storage": torch.uint8}),
    Case(
        name="fsdp2-replicated-storage-uint8",
        kind=FSDP2,
        quant={"quant_storage": torch.uint8},
        placement="replicated",
    ),
]

DDP_CASES = [
    Case(name="ddp", kind=DDP),
    Case(name="ddp-odd", kind=DDP, model="odd"),
    Case(name="ddp-accumulation", kind=DDP, accumulation=2),
]

#: What more ranks than two do not change.
DDP_ON_TWO = [
    Case(name="ddp-storage-uint8", kind=DDP, quant={"quant_storage": torch.uint8}),
    Case(name="ddp-biased-fp4", kind=DDP, model="biased", quant={"quant_type": "fp4"}),
    Case(name="ddp-tied", kind=DDP, model="tied"),
    Case(name="ddp-checkpointing", kind=DDP, checkpointing="non-reentrant"),
    Case(name="ddp-many-buckets", kind=DDP, shard={"bucket_cap_mb": 0.001, "gradient_as_bucket_view": False}),
    Case(name="ddp-static-graph", kind=DDP, shard={"static_graph": True}),
]

#: Checkpoints that are packed already; `quant` says how, but for the storage.
STORED_CASES = [
    Case(name="stored", stored=True),
    Case(
        name="stored-fp4-single-128",
        stored=True,
        quant={"quant_type": "fp4", "double_quant": False, "blocksize": 128},
    ),
    Case(name="stored-odd-storage-bf16", stored=True, model="odd", quant={"quant_storage": torch.bfloat16}),
    Case(name="stored-tied-orig-params", stored=True, model="tied", shard={"use_orig_params": True}),
    Case(name="fsdp2-stored-biased", stored=True, kind=FSDP2, model="biased"),
    Case(name="fsdp2-stored-odd", stored=True, kind=FSDP2, model="odd"),
    Case(name="fsdp2-stored-replicated-tied", stored=True, kind=FSDP2, model="tied", placement="replicated"),
    Case(name="ddp-stored-odd", stored=True, kind=DDP, model="odd"),
]

CASES = [
    *FSDP1_CASES,
    *FSDP2_CASES,
    *DDP_CASES,
    *STORED_CASES,
    *(INTEGER_CASES if Version(torch.__version__).release >= SHARDS_INTEGERS else ()),
]

#: What is the same on two ranks and on three: how units are made, freed and recomputed, not what a rank keeps.
_ON_TWO_ALONE = ("checkpointing", "shard-grad-op", "no-shard", "block-units", "accumulation", "kept", "mixed-precision")

#: By what decides what a rank keeps, the last case of each: how weights are quantized is tried on two ranks.
ON_THREE = list(
    {
        (case.kind, str(case.shard), case.placement, case.model, case.stored): case
        for case in CASES
        if not any(name in case.name for name in _ON_TWO_ALONE)
    }.values()
)

#: Also on one rank, where a process group gathers from nobody.
ON_ONE = [case for case in [*CASES, *DDP_ON_TWO] if case.kind in (FSDP2, DDP) and case.model in ("tied", "odd")]

#: Meshes of one shard, too.
ON_TWO = [
    *DDP_ON_TWO,
    Case(name="fsdp2-replicas", kind=FSDP2, shard={"mesh": (2, 1)}),
    Case(name="fsdp2-replicas-odd", kind=FSDP2, model="odd", shard={"mesh": (2, 1)}),
]

ON_FOUR = [
    Case(name="hybrid", shard={"strategy": "hybrid-shard", "mesh": (2, 2)}),
    Case(name="hybrid-orig-params", shard={"strategy": "hybrid-shard", "mesh": (2, 2), "use_orig_params": True}),
    Case(name="fsdp2-four", kind=FSDP2),
    Case(name="fsdp2-four-odd", kind=FSDP2, model="odd", quant={"quant_storage": torch.bfloat16}),
    Case(name="fsdp2-hybrid", kind=FSDP2, shard={"mesh": (2, 2)}),
    Case(
        name="fsdp2-hybrid-odd",
        kind=FSDP2,
        model="odd",
        quant={"quant_storage": torch.bfloat16},
        shard={"mesh": (2, 2)},
    ),
    Case(name="fsdp2-hybrid-tied", kind=FSDP2, model="tied", shard={"mesh": (2, 2)}),
    Case(name="fsdp2-hybrid-replicated", kind=FSDP2, placement="replicated", shard={"mesh": (2, 2)}),
    Case(name="fsdp2-hybrid-accumulation", kind=FSDP2, shard={"mesh": (2, 2)}, accumulation=3),
    Case(name="fsdp2-hybrid-stored-odd", stored=True, kind=FSDP2, model="odd", shard={"mesh": (2, 2)}),
    Case(name="fsdp2-resharded-to-two", kind=FSDP2, shard={"reshard_after_forward": 2}),
]

#: FSDP1 moves parameters between an accelerator and the CPU, and there has to be one.
OFFLOADED = [
    Case(name="cpu-offload", shard={"cpu_offload": True}),
    Case(name="cpu-offload-orig-params", shard={"cpu_offload": True, "use_orig_params": True}),
    Case(name="cpu-offload-storage-bf16", quant={"quant_storage": torch.bfloat16}, shard={"cpu_offload": True}),
    Case(name="cpu-offload-tied", model="tied", shard={"cpu_offload": True}),
    Case(name="cpu-offload-replicated", placement="replicated", shard={"cpu_offload": True}),
]


def save_models(root: Path) -> dict[str, Path]:
    """Checkpoints that the cases name (`Case.folder`), in folders of `root`."""
    found = {name: save_tiny(root / name, kind, **changes) for name, (kind, changes) in MODELS.items()}
    for number, case in enumerate([*CASES, *ON_FOUR]):
        if case.folder in found:
            continue
        folder = root / f"packed-{number}"
        save_packed(quantized(found[case.model], case), folder, found[case.model] / "config.json")
        found[case.folder] = folder
    return found
