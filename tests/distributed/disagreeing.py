"""Two ranks that are told different things: what `surgery.qlora` says on each."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import surgery
from surgery.config import FSDP1, FSDP2, Quant
from tests.helpers.models import save_tiny, tiny_config

__all__ = ["SAME", "SAYS", "copies", "differing"]


def _lora(**changes: Any) -> dict[str, Any]:
    from peft import LoraConfig

    return {"lora": LoraConfig(**{"r": 2, "target_modules": "all-linear", **changes})}


def _built(**changes: Any) -> dict[str, Any]:
    def build() -> nn.Module:
        from transformers import AutoModelForCausalLM

        config = tiny_config(**changes)
        config.use_cache = False
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model

    return {"model": build}


class Plain(nn.Module):
    """Without a config: what makes two of them differ is in their modules, or in a table."""

    def __init__(self, activation: nn.Module, base: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.activation = activation
        self.register_buffer("table", base ** torch.arange(8.0), persistent=False)


def _plain(activation: Callable[[], nn.Module] = nn.ReLU, base: float = 2.0) -> dict[str, Any]:
    return {"model": lambda: Plain(activation(), base)}


#: What rank 1 is told in place of what rank 0 is told; a text is the folder of the checkpoint.
Told = Mapping[str, Any]

CASES: dict[str, tuple[Callable[[], Told], Callable[[], Told]]] = {
    "weights": (dict, lambda: {"folder": "other-weights"}),
    "one-tensor": (dict, lambda: {"folder": "one-other-tensor"}),
    "stored-dtype": (dict, lambda: {"folder": "float16"}),
    "rope": (dict, lambda: {"folder": "other-rope"}),
    "epsilon": (dict, lambda: {"folder": "other-epsilon"}),
    "blocksize": (dict, lambda: {"quant": Quant(blocksize=128)}),
    "quantizer": (lambda: {"quant": Quant("fp4", double_quant=False)}, dict),
    "skipped": (dict, lambda: {"quant": Quant(skip_modules=("down_proj",))}),
    "adapters": (dict, lambda: _lora(r=4, lora_alpha=32)),
    "targets": (lambda: _lora(target_modules=["q_proj", "v_proj"]), lambda: _lora(target_modules=["q_proj"])),
    "no-adapters": (dict, lambda: {"lora": None}),
    "refused-there": (dict, lambda: _lora(use_dora=True)),
    "fsdp": (dict, lambda: {"shard": FSDP1()}),
    "unsharded": (dict, lambda: {"shard": None}),
    "resharding": (dict, lambda: {"shard": FSDP2(reshard_after_forward=False)}),
    "reduction": (dict, lambda: {"shard": FSDP2(mixed_precision=MixedPrecisionPolicy(reduce_dtype=torch.float32))}),
    "placement": (dict, lambda: {"placement": "replicated"}),
    "dtype": (dict, lambda: {"dtype": torch.float32}),
    "compute-dtype": (dict, lambda: {"compute_dtype": torch.float32}),
    "libraries": (dict, lambda: {"version": "0.0.1"}),
    "hub-id": (dict, lambda: {"folder": None}),
    "built-rope": (_built, lambda: _built(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "built-activation": (lambda: {"folder": "plain", **_plain()}, lambda: {"folder": "plain", **_plain(nn.GELU)}),
    "built-table": (lambda: {"folder": "plain", **_plain()}, lambda: {"folder": "plain", **_plain(base=2.5)}),
}

#: What each of them has to say, on both ranks.
SAYS: dict[str, tuple[str, ...]] = {
    "weights": ("differ in checkpoint,", "model.embed_tokens.weight is bfloat16 (96, 64), ", "checkpoint: so do "),
    "one-tensor": ("differ in checkpoint,", "model.layers.1.mlp.up_proj.weight is bfloat16"),
    "stored-dtype": ("is bfloat16 (96, 64), ", " on rank 0, float16 (96, 64), "),
    "rope": ("configuration", "rope_parameters.rope_theta is 10000.0 on rank 0, 500000.0 on rank 1"),
    "epsilon": ("configuration", "rms_norm_eps is 1e-06 on rank 0, 0.001 on rank 1"),
    "blocksize": ("differ in quantization,", "blocksize is 64 on rank 0, 128 on rank 1"),
    "quantizer": ("quant_type is fp4 on rank 0, nf4 on rank 1", "double_quant is False on rank 0, True on rank 1"),
    "skipped": ("skip_modules.0 is not there on rank 0, down_proj on rank 1",),
    "adapters": ("differ in adapters,", "r is 2 on rank 0, 4 on rank 1", "lora_alpha is 8 on rank 0, 32 on rank 1"),
    "targets": ("target_modules.v_proj is given on rank 0, not there on rank 1",),
    "no-adapters": ("kind is LoraConfig on rank 0, not there on rank 1",),
    "refused-there": ("use_dora is False on rank 0, True on rank 1",),
    "fsdp": ("differ in sharding,", "shard is FSDP2 on rank 0, FSDP1 on rank 1", "placement is sharded on rank 0"),
    "unsharded": ("shard is FSDP2 on rank 0, None on rank 1",),
    "resharding": ("shard.reshard_after_forward is True on rank 0, False on rank 1",),
    "reduction": ("shard.mixed_precision.reduce_dtype is not there on rank 0, torch.float32 on rank 1",),
    "placement": ("placement is sharded on rank 0, replicated on rank 1",),
    "dtype": ("differ in precision,", "dtype is torch.bfloat16 on rank 0, torch.float32 on rank 1"),
    "compute-dtype": ("compute_dtype is torch.bfloat16 on rank 0, torch.float32 on rank 1",),
    "libraries": ("libraries: peft is ", " on rank 0, 0.0.1 on rank 1"),
    "hub-id": ("kind is an absolute path, or open already on rank 0, a hub id, or",),
    "built-rope": ("rope_parameters.rope_theta is 10000.0 on rank 0, 500000.0 on rank 1",),
    "built-activation": ("differ in model,", "activation is ReLU() on rank 0, GELU(approximate='none') on rank 1"),
    "built-table": ("differ in model,", "table is float32 (8,), 255 in sum on rank 0"),
}

#: What ranks may be told differently, since it comes to the same.
SAME: dict[str, tuple[Callable[[], Told], Callable[[], Told]]] = {
    "equal numbers": (lambda: _lora(lora_alpha=8), lambda: _lora(lora_alpha=8.0)),
    "default dtype": (dict, lambda: {"default_dtype": torch.float64}),
    "default placement": (dict, lambda: {"placement": "sharded"}),
    "another copy, in other files": (dict, lambda: {"folder": "one-file"}),
    "targets in another order": (
        lambda: _lora(target_modules=["q_proj", "v_proj"]),
        lambda: _lora(target_modules=["v_proj", "q_proj"]),
    ),
}


def copies(folder: Path) -> Path:
    """Checkpoints below `folder`: one, and others that differ from it in what they are called after."""
    from safetensors.torch import load_file, save_file

    first = save_tiny(folder / "first")
    save_tiny(folder / "other-weights", seed=1)
    save_tiny(folder / "float16", dtype=torch.float16)
    save_tiny(folder / "one-file", shard_size="1GB")
    config = json.loads((first / "config.json").read_text())
    (folder / "one-file" / "config.json").write_text(json.dumps({**config, "transformers_version": "4.57.0"}))
    rope = {**config["rope_parameters"], "rope_theta": 500000.0}
    for name, changes in {"other-rope": {"rope_parameters": rope}, "other-epsilon": {"rms_norm_eps": 1e-3}}.items():
        shutil.copytree(first, folder / name)
        (folder / name / "config.json").write_text(json.dumps({**config, **changes}))
    shutil.copytree(first, folder / "one-other-tensor")
    for file in (folder / "one-other-tensor").glob("*.safetensors"):
        tensors = load_file(file)
        changed = {name: -tensor if "1.mlp.up_proj" in name else tensor for name, tensor in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})
    (folder / "plain").mkdir()
    save_file(
        {f"{name}.weight": torch.ones(64, 64) for name in ("first", "second")}, folder / "plain/model.safetensors"
    )
    return folder


def differing(folder: Path) -> dict[str, str]:
    """What `qlora` raises here in each case, none of which reads a weight; then the same ranks load what agrees."""
    from surgery.checkpoint import Reader
    from tests.helpers.reads import count_reads

    stock = Reader.read_bytes
    reads, Reader.read_bytes = count_reads()  # type: ignore[method-assign]  # of this process alone
    said = {name: _refusal(folder, told[dist.get_rank()]()) for name, told in CASES.items()}
    assert not reads
    Reader.read_bytes = stock  # type: ignore[method-assign]
    return said | {name: _load(folder, told[dist.get_rank()]()) for name, told in SAME.items()}


def _refusal(folder: Path, told: Told) -> str:
    with pytest.raises(surgery.ConfigError) as caught:
        _load(folder, told)
    return str(caught.value)


def _load(folder: Path, told: Told) -> str:
    options = {**_lora(), "shard": FSDP2(), **told}
    name = options.pop("folder", "first")
    with contextlib.ExitStack() as stack:
        if "default_dtype" in options:
            torch.set_default_dtype(options.pop("default_dtype"))
            stack.callback(torch.set_default_dtype, torch.float32)
        if "version" in options:
            _pretend(stack.enter_context(pytest.MonkeyPatch.context()), options.pop("version"))
        source = "owner/name" if name is None else folder / name
        model = stack.enter_context(surgery.qlora(source, report=surgery.Report(), **options))
        logits = model(input_ids=torch.arange(8).view(1, 8)).logits
        return str(logits.float().logsumexp(-1).mean().item())


def _pretend(patch: pytest.MonkeyPatch, version: str) -> None:
    from surgery.model import consistency

    stock = consistency.installed_version
    patch.setattr(consistency, "installed_version", lambda name: version if name == "peft" else stock(name))
