"""Pass `shard`: the model over the ranks, by its strategy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import model_surgery_patches as patches
from surgery.comm.background import return_freed_memory
from surgery.errors import ConfigError
from surgery.model.tree import modules_of
from surgery.passes.base import Pass
from surgery.passes.loading import Loading

__all__ = ["Finish", "ShardOnMeta"]


@dataclass(frozen=True, kw_only=True)
class ShardOnMeta(Pass):
    """Shards a model that is on meta. After: what is on meta is the rank's shard of it, to be filled."""

    name = "shard"

    loading: Loading

    def run(self, model: nn.Module) -> nn.Module:
        """The sharded model."""
        setting = self.loading.setting
        model = setting.strategy.shard_on_meta(model, setting.format)
        return_freed_memory()  # of adapters, which are shards now
        return model


@dataclass(frozen=True, kw_only=True)
class Finish(Pass):
    """Shards a model that is filled, unless it is sharded already. After: adapters are the same on all ranks."""

    name = "shard"
    is_collective = True

    loading: Loading

    def run(self, model: nn.Module) -> nn.Module:
        """The complete model."""
        setting, devices = self.loading.setting, self.loading.buffers.devices
        every = [held for module in modules_of(model) for held in (module._parameters, module._buffers) if held]
        if devices.keeps_data and any(t is not None and t.is_meta for held in every for t in held.values()):
            empty = [name for name, held in (*model.named_parameters(), *model.named_buffers()) if held.is_meta]
            raise ConfigError(f"{empty[0]} is on meta ({len(empty)} in all): a complete model comes after install")
        with patches.transaction(
            *(each for quant in setting.formats for each in quant.build_patches(model)),
            *setting.strategy.build_patches,
            "torch.meta-param-replacement",
            reason="a sharding rebuilds a model that is partly on meta",
        ):
            return setting.strategy.finish(model, setting.format)
