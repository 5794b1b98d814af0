"""Facts that must be the same on all ranks that build one model, compared before a weight is read."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.checkpoint import Checkpoint, Index
from surgery.checkpoint.hub import can_be_hub_id
from surgery.checkpoint.reader import samples
from surgery.comm.comparison import Facts, all_alike, facts_of, same_on_every_rank
from surgery.comm.failures import noticing_ends
from surgery.comm.ranks import Ranks

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "LIBRARIES",
    "adapter_facts",
    "environment",
    "installed_version",
    "same_adapter",
    "same_model",
    "source_facts",
]

LIBRARIES = ("model-surgery", "model-surgery-patches", "torch", "bitsandbytes", "peft", "transformers")

#: Where a model came from and who wrote it: the same model may have come from elsewhere on another node.
PROVENANCE = frozenset(
    {"_name_or_path", "_commit_hash", "transformers_version", "base_model_name_or_path", "peft_version"}
)


def environment(device: torch.device) -> dict[str, Facts]:
    """Facts of this process: its kind of device, versions of libraries, patches that act on all of it."""
    return {
        "device": {"type": device.type},
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "patches": dict.fromkeys(patches.active_set(), "active"),
    }


@cache
def installed_version(distribution: str) -> str:
    """The version, or "not installed"; read once, since what is imported does not change."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def adapter_facts(lora: LoraConfig | None) -> Facts:
    """Everything that shapes adapters."""
    return facts_of(lora, without=PROVENANCE)


def source_facts(checkpoint: Checkpoint | str | os.PathLike[str]) -> Facts:
    """Whether ranks open `checkpoint` together or each by itself. Paths need not agree: what is in them is compared."""
    together = isinstance(checkpoint, str) and can_be_hub_id(checkpoint)
    return {"kind": "a hub id, or a path relative to this folder" if together else "an absolute path, or open already"}


def same_model(ranks: Ranks, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` on every rank unless `model`, on meta, and the content of `checkpoint` are the same on all.

    Of the content names, dtypes and shapes; and, unless all ranks look at the very same files, a few bytes of every
    tensor. To be called on all ranks alike, inside of `everyone`.
    """
    if ranks.world_size == 1:
        return
    topics = {
        "configuration": dict(_configuration(model)),
        "model": dict(_structure(model)),
        "checkpoint": _contents(ranks, checkpoint.index, "files"),
    }
    same_on_every_rank(ranks, "model", topics)


def same_adapter(ranks: Ranks, index: Index) -> None:
    """Raise `ConfigError` on every rank unless the file of an adapter is the same on all; as `same_model`."""
    if ranks.world_size > 1:
        same_on_every_rank(ranks, "adapter", {"adapter": _contents(ranks, index, "adapter's file")})


def _contents(ranks: Ranks, index: Index, name: str) -> Facts:
    tensors = {name: f"{_short(entry.dtype)} {tuple(entry.shape)}" for name, entry in index.items()}
    key = f"{ranks.prefix}/{name}/seed"
    with noticing_ends():
        if ranks.rank == 0:  # other places in each run, so that none is never looked at
            ranks.store.set(key, os.urandom(16))
    if all_alike(ranks, name, _identity(index)):
        return tensors
    with noticing_ends():
        seed = ranks.store.get(key)
    found = samples(index, seed=seed)
    return {name: f"{text}, {found[name]}" for name, text in tensors.items()}


def _identity(index: Index) -> str:
    """The identity of the files: equal for two ranks that read the same ones on the same machine."""
    stamps = sorted((stamp.device, stamp.inode, stamp.size, stamp.modified) for stamp in index.stamps.values())
    return f"{_machine()} {stamps}"


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def _configuration(model: nn.Module) -> Iterator[tuple[str, str]]:
    """All settings in the config of a model that has one, such as those of transformers."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        yield from facts_of(config.to_dict(), without=PROVENANCE).items()
        yield "attention", str(getattr(config, "_attn_implementation", None))


def _structure(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every module with its `extra_repr`, every parameter and buffer; no values of parameters, which are adapters'."""
    for name, module in model.named_modules():
        yield from facts_of(_settings(module), name or "the model").items()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, f"{_short(parameter.dtype)} {tuple(parameter.shape)}"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, _described(buffer)


def _settings(module: nn.Module) -> str:
    try:
        return f"{type(module).__name__}({module.extra_repr()})"
    except Exception:  # noqa: BLE001  # what a module says for people may need values, which there are none of on meta
        return type(module).__name__


def _described(tensor: torch.Tensor) -> str:
    text = f"{_short(tensor.dtype)} {tuple(tensor.shape)}"
    if tensor.is_meta:
        return text
    # Rounded: processors of different kinds compute the last bits of a table differently.
    sizes = (tensor.abs() if tensor.is_complex() else tensor).double().abs()
    return f"{text}, {sizes.sum().item():.5g} in sum"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
