"""Shard the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from surgery.config import FSDP1, FSDP2
from surgery.model.pretrained import is_pretrained
from surgery.model.tree import decoder_blocks
from surgery.passes.base import Pass
from surgery.quantizers.bnb import is_params4bit, kept_parameters, linear4bits
from surgery.sharding import fsdp1, fsdp2, guards

__all__ = ["FullyShard", "Wrap", "check_dtypes"]


@dataclass(frozen=True, kw_only=True)
class Wrap(Pass):
    """FSDP1: wraps the model as `config` says. After: every rank holds its shard, on `device`, with rank 0's values.

    What upstream keeps in another dtype than `dtype`, the model's, stays whole on every rank: router gates and the like
    are small, are read from outside of the module that holds them, and would not fit in the flat parameter of a block.
    """

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"filled"})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded"})

    config: FSDP1
    device: torch.device
    dtype: torch.dtype

    def run(self, model: nn.Module) -> nn.Module:
        """The `FullyShardedDataParallel` around `model`."""
        kept = kept_parameters(model, self.dtype, ends=False).values()
        unsharded = {parameter for parameter in kept if not parameter.requires_grad}
        units = _units(model, self.config, unsharded, use_orig_params=self.config.use_orig_params)
        return fsdp1.wrap(model, units, self.config, device=self.device, unsharded=unsharded)


def check_dtypes(model: nn.Module, shard: FSDP1 | FSDP2 | None, dtype: torch.dtype) -> frozenset[str]:
    """FQNs of the parameters that will stay whole on every rank, because upstream keeps them in another dtype than
    `dtype`, the model's.

    Raises `ConfigError` if `shard` cannot keep one. `model` is on meta, its linear modules are replaced, and it is not
    adapted yet.
    """
    kept = kept_parameters(model, dtype)
    unsharded = kept_parameters(model, dtype, ends=False) if isinstance(shard, FSDP1) else {}
    if isinstance(shard, FSDP1):
        _units(model, shard, set(unsharded.values()), use_orig_params=True)  # what is trained is not known yet
    named = model.named_buffers() if is_pretrained(model) else ()
    buffers = {name: buffer.dtype for name, buffer in named if buffer.is_floating_point()}
    guards.check_kept(shard, [name for name in kept if name not in unsharded], buffers, dtype)
    return frozenset(unsharded)


def _units(model: nn.Module, config: FSDP1, unsharded: set[nn.Parameter], *, use_orig_params: bool) -> set[nn.Module]:
    blocks = [site.module for site in decoder_blocks(model)]
    return fsdp1.plan_units(model, blocks, use_orig_params=use_orig_params, policy=config.units, unsharded=unsharded)


@dataclass(frozen=True, kw_only=True)
class FullyShard(Pass):
    """FSDP2: shards the model in place, over `mesh`. What is on meta stays there, as shards, to be filled; the rest is
    this rank's shard of what it was.
    """

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized-modules"})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded"})

    config: FSDP2
    mesh: DeviceMesh

    def run(self, model: nn.Module) -> nn.Module:
        """`model` itself."""
        _make_plain(model)
        fsdp2.shard(model, decoder_blocks(model), self.config, self.mesh)
        return model


def _make_plain(model: nn.Module) -> None:
    """Give 4-bit layers on meta plain parameters, which FSDP2 makes of theirs anyway: for each operation on one of its
    own class bitsandbytes goes through Python.
    """
    for layer in linear4bits(model):
        weight: torch.Tensor = layer.weight
        if is_params4bit(weight) and weight.is_meta:
            plain = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            layer._parameters["weight"] = nn.Parameter(plain, requires_grad=False)
