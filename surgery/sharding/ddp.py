"""DDP: every rank has the whole model, and gradients of adapters are averaged over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from surgery.config import DDP
from surgery.errors import ConfigError
from surgery.model.fqn import clean, join
from surgery.quantizers.base import QuantFormat
from surgery.sharding.base import Trained, outermost, register
from surgery.sharding.steps import Steps
from surgery.sharding.unsharded import Unsharded

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Ddp"]


class Ddp(Unsharded):
    """The strategy of `surgery.DDP`."""

    label = "DDP"
    placements = ("replicated",)
    ranks_agree = True
    options: DDP | None

    def check(self) -> None:
        """Refuse placements under which a rank would lack weights."""
        if self.placement != "replicated":
            raise ConfigError(
                f"placement {self.placement} leaves ranks without weights, and DDP runs the whole model on every rank: "
                "use placement='replicated', or shard=FSDP2()"
            )

    def check_format(self, quant: QuantFormat, *, adapted: bool) -> None:
        """Refuse a model that has nothing to train."""
        if not adapted:
            raise ConfigError(
                "DDP averages gradients, but without lora nothing is trained: pass lora=, or leave shard out"
            )

    def check_added(self, lora: LoraConfig) -> None:
        """Refuse to train what DDP does not know of."""
        if not lora.inference_mode:
            raise ConfigError(
                "DDP averages the gradients of the parameters that it was built around, and waits for those: an "
                "adapter that is added later can be evaluated, not trained. Begin from it (surgery.qlora(adapter=...))"
                ", load it in the place of the one that is trained, by its name, or use shard=FSDP2()"
            )

    def finish(self, model: nn.Module, quant: QuantFormat) -> DistributedDataParallel:
        """The `DistributedDataParallel` around `model`."""
        assert self.options is not None
        wrapped = DistributedDataParallel(
            super().finish(model, quant),
            init_sync=False,  # all have loaded the same weights, and adapters are rank 0's already
            find_unused_parameters=self.options.find_unused_parameters,
            gradient_as_bucket_view=self.options.gradient_as_bucket_view,
            bucket_cap_mb=self.options.bucket_cap_mb,
            static_graph=self.options.static_graph,
        )
        # A decoder does not change its buffers. As an argument this is deprecated, and has another name, in torch 2.13.
        wrapped.broadcast_buffers = False
        return wrapped

    @classmethod
    def made(cls, model: nn.Module) -> bool:
        """Whether `model` is, or has in it, a `DistributedDataParallel`."""
        return outermost(model, DistributedDataParallel) is not None

    def steps(self, model: nn.Module) -> Steps:
        """Those of the model inside: DDP averages each gradient when autograd adds it to its parameter, as ever."""
        return Steps(_inside(model)[1])

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Copies on rank 0, by names without the wrapper."""
        name, inner = _inside(model)
        state = super().trainable_state(inner, also)
        return {clean(join(name, each)): tensor for each, tensor in state.items()}

    def trained(self, model: nn.Module) -> list[Trained]:
        """Whole parameters, by names without the wrapper."""
        name, inner = _inside(model)
        found = []
        for each in super().trained(inner):
            spans = tuple(replace(span, name=clean(join(name, span.name))) for span in each.spans)
            found.append(replace(each, spans=spans))
        return found


def _inside(model: nn.Module) -> tuple[str, nn.Module]:
    """The FQN of the wrapper in `model`, and what is in it."""
    name, root = next((n, m) for n, m in model.named_modules() if isinstance(m, DistributedDataParallel))
    return name, root.module


register(DDP, Ddp)
