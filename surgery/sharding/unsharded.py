"""No sharding: every rank has the whole model, and trains it by itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from surgery.comm.ranks import broadcast_from_rank0
from surgery.errors import ConfigError
from surgery.model.tree import convert
from surgery.quantizers.base import QuantFormat
from surgery.sharding.base import ShardStrategy, chosen_parameters, register
from surgery.sharding.steps import Steps

__all__ = ["Unsharded", "copies"]


class Unsharded(ShardStrategy):
    """The strategy of `shard=None`. On several ranks adapters begin alike; nothing is exchanged after that."""

    ranks_agree = False
    records_steps = True

    def check(self) -> None:
        """Refuse placements that wait for a sharding."""
        if self.placement == "sharded":
            raise ConfigError(
                "placement sharded keeps each rank's shard alone, but without shard there is none to keep: use "
                "shard=FSDP2(), or placement='replicated'"
            )
        if self.placement == "rank0-cpu" and self.world_size > 1:
            raise ConfigError(
                f"placement rank0-cpu leaves {self.world_size - 1} of {self.world_size} ranks on meta, and without "
                "shard nothing would bring the weights to them: use shard=FSDP1(), or placement='replicated'"
            )
        super().check()

    def finish(self, model: nn.Module, quant: QuantFormat) -> nn.Module:
        """`model` itself, its adapters on the device, with rank 0's values."""
        quant.finish(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        convert(trainable, device=self.device)
        if self.world_size > 1:
            broadcast_from_rank0(trainable, device=self.device)
        return model

    def steps(self, model: nn.Module) -> Steps:
        """Those of `model` itself."""
        return Steps(model)

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Copies on rank 0, whose parameters are those of all ranks, or its own."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return {}
        return copies(chosen_parameters(model, also))


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; names of one parameter have one tensor."""
    moved = {parameter: parameter.detach().cpu().clone() for parameter in set(parameters.values())}
    return {name: moved[parameter] for name, parameter in parameters.items()}


register(type(None), Unsharded)
