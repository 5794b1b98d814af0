"""The optimizer over the parameters that train."""

from __future__ import annotations

import torch
from torch import nn

from surgery.errors import ConfigError
from surgery.finetune.choices import OptimizerName

__all__ = ["build_optimizer"]


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
