"""Shard the model over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from surgery.config import FSDP1
from surgery.distributed.fsdp1 import plan_units, wrap
from surgery.passes.base import Pass
from surgery.walk import decoder_blocks

__all__ = ["Shard"]


@dataclass(frozen=True, kw_only=True)
class Shard(Pass):
    """Wraps the model as `config` says. After: every rank holds its shard, on `device`, with rank 0's values."""

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded"})

    config: FSDP1
    device: torch.device

    def run(self, model: nn.Module) -> nn.Module:
        """The `FullyShardedDataParallel` around `model`."""
        blocks = [site.module for site in decoder_blocks(model)]
        units = plan_units(model, blocks, use_orig_params=self.config.use_orig_params, policy=self.config.units)
        return wrap(model, units, self.config, device=self.device)
