from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_kernel import CALLS


class LigerRMSNorm(nn.Module):
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        CALLS["norm"] += 1
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * wide.to(hidden_states.dtype)


class LigerSwiGLUMLP(nn.Module):
    def forward(self: Any, y: torch.Tensor) -> torch.Tensor:  # under another name than the stock one's
        CALLS["mlp"] += 1
        gate = self.gate_proj(y)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(y))


class LigerExperts(nn.Module):
    def forward(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        raise AssertionError("multiplies by weights that may be packed")


@torch.compiler.disable  # as Liger's
def liger_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    CALLS["rotary"] += 1
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    return turned(q), turned(k)


def liger_cross_entropy(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("replaces torch's function for everybody")
