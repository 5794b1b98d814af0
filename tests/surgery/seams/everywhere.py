"""A strategy that no library has: every rank keeps everything, and adds up the gradients of adapters by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    def __init__(self, module: nn.Module, columns: int) -> None:
        super().__init__()
        self.module = module
        self.columns = columns

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


class ColumnsEverywhere(Unsharded):
    """Gradients travel column by column, after the last micro-step."""

    label = "columns everywhere"
    placements = ("replicated",)

    def finish(self, model: nn.Module, quant: object) -> nn.Module:
        return AddingUp(super().finish(model, quant), self.options.columns)  # type: ignore[arg-type]

    @classmethod
    def made(cls, model: nn.Module) -> bool:
        return isinstance(model, AddingUp)

    @property
    def averaged_over(self) -> int:
        return self.world_size

    @contextmanager
    def micro_step(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        yield
        assert isinstance(model, AddingUp)
        for parameter in model.parameters() if is_last else ():
            if parameter.grad is not None:
                _add_up(parameter.grad, model.columns, self.world_size)

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        state = super().trainable_state(model, also)
        return {name.removeprefix("module."): value for name, value in state.items()} if dist.get_rank() == 0 else {}

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(value)
        return value


def _add_up(gradient: torch.Tensor, columns: int, world_size: int) -> None:
    for first in range(0, gradient.shape[1], columns):
        piece = gradient[:, first : first + columns].contiguous()
        dist.all_reduce(piece)
        gradient[:, first : first + columns] = piece / world_size


register(Everywhere, ColumnsEverywhere)
