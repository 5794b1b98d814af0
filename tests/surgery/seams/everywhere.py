"""A strategy that no library has: every rank keeps everything, and adds up the gradients of adapters by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from surgery.sharding.base import register
from surgery.sharding.unsharded import Unsharded

__all__ = ["Everywhere"]


@dataclass(frozen=True, kw_only=True)
class Everywhere:
    """The options of the strategy. columns: of an adapter's gradient that are exchanged at a time."""

    columns: int = 2


class AddingUp(nn.Module):
    """A model around another one, by which the strategy is recognized."""

    def __init__(self, module: nn.Module, columns: int, world_size: int) -> None:
        super().__init__()
        self.module = module
        for parameter in module.parameters():
            if parameter.requires_grad:
                add_up = partial(_add_up, columns=columns, world_size=world_size)
                parameter.register_post_accumulate_grad_hook(add_up)  # type: ignore[no-untyped-call]  # of torch

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


class ColumnsEverywhere(Unsharded):
    """Gradients travel column by column, each as soon as it is there."""

    label = "columns everywhere"
    placements = ("replicated",)

    def finish(self, model: nn.Module, quant: object) -> nn.Module:
        return AddingUp(super().finish(model, quant), self.options.columns, self.world_size)  # type: ignore[arg-type]

    @classmethod
    def made(cls, model: nn.Module) -> bool:
        return isinstance(model, AddingUp)

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        state = super().trainable_state(model, also)
        return {name.removeprefix("module."): value for name, value in state.items()} if dist.get_rank() == 0 else {}


def _add_up(parameter: torch.Tensor, *, columns: int, world_size: int) -> None:
    gradient = parameter.grad
    assert gradient is not None
    for first in range(0, gradient.shape[1], columns):
        piece = gradient[:, first : first + columns].contiguous()
        dist.all_reduce(piece)
        gradient[:, first : first + columns] = piece / world_size


register(Everywhere, ColumnsEverywhere)
