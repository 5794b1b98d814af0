"""Shard the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from surgery.config import FSDP1, FSDP2
from surgery.distributed import fsdp1, fsdp2
from surgery.passes.base import Pass
from surgery.quantizers.bnb import is_params4bit, linear4bits
from surgery.walk import decoder_blocks

__all__ = ["FullyShard", "Wrap"]


@dataclass(frozen=True, kw_only=True)
class Wrap(Pass):
    """FSDP1: wraps the model as `config` says. After: every rank holds its shard, on `device`, with rank 0's values."""

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"filled"})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded"})

    config: FSDP1
    device: torch.device

    def run(self, model: nn.Module) -> nn.Module:
        """The `FullyShardedDataParallel` around `model`."""
        blocks = [site.module for site in decoder_blocks(model)]
        units = fsdp1.plan_units(model, blocks, use_orig_params=self.config.use_orig_params, policy=self.config.units)
        return fsdp1.wrap(model, units, self.config, device=self.device)


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
