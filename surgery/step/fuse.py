"""Fused 4-bit LoRA layers."""

from __future__ import annotations

from torch import nn

__all__ = ["fuse"]


def fuse(model: nn.Module) -> int:
    """Fuse no layer of `model` yet; returns how many."""
    del model
    return 0
