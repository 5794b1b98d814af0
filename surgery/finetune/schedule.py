"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from surgery.errors import ConfigError
from surgery.finetune.choices import OptimizerName, ScheduleName

__all__ = ["Schedule", "build_optimizer"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warmup to `peak`, then cosine or linear decay to 0, or no decay.

    Step 0 already learns (at `peak / warmup_steps`), the last step of the warmup is at `peak`, and 0 would be
    reached at step `steps`, one after the last: no step is wasted at rate 0. Raises `ConfigError` for values
    out of range.
    """

    name: ScheduleName
    peak: float
    steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ConfigError(f"expected the schedule to be cosine, linear or constant, found {self.name!r}")
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ConfigError(f"expected a learning rate above 0, found {self.peak}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(
                f"expected between 0 and {self.steps} warmup steps (there are {self.steps} steps in all), "
                f"found {self.warmup_steps}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        remaining = 1 - progress if self.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.peak * remaining


def build_optimizer(
    model: nn.Module, name: OptimizerName, *, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`, as they are after sharding.

    AdamW takes one kernel for all of them on a GPU. Raises `ConfigError` if nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("expected trainable parameters (adapters), found none: every parameter is frozen")
    if name == "adamw":
        on_gpu = all(parameter.is_cuda for parameter in trainable)
        return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay, fused=on_gpu)
    return torch.optim.SGD(trainable, lr=lr, weight_decay=weight_decay)
