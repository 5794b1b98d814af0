"""Kernels in plain torch, with the signatures of the Triton and CUDA kernels that they stand for: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding by halves, without the concatenated copy that `rotate_half` makes."""
    cos, sin = (table.chunk(2, dim=-1)[0].unsqueeze(unsqueeze_dim) for table in (cos, sin))

    def turned(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return turned(q), turned(k)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in one call."""
    return weight * functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=eps).to(hidden.dtype)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU: `silu(gate) * up`."""
    return gate * torch.sigmoid(gate) * up


def cross_entropy(
    source: torch.Tensor,
    target: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **_kwargs: Any,
) -> torch.Tensor:
    """Mean loss from the logarithm of the sum alone; or the sum by `num_items_in_batch`."""
    kept = target != ignore_index
    at_target = source.gather(1, target.where(kept, 0)[:, None])[:, 0]
    losses = (source.logsumexp(dim=1) - at_target) * kept
    return losses.sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    chunk: int = 4,
) -> torch.Tensor:
    """Loss of the next token; the logits of `chunk` tokens exist at a time."""
    hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([cross_entropy((rows @ weight.T).float(), targets, items) for rows, targets in parts]).sum()


class PrefixGrouper:
    """Attention of several continuations that share one prompt, packed as `[prompt, first, second, ...]`."""

    def __init__(self, prompt: int, continuations: tuple[int, ...]) -> None:
        self.prompt = prompt
        self.continuations = continuations

    @property
    def positions(self) -> torch.Tensor:
        """Position ids of the packed sequence: every continuation begins where the prompt ends."""
        parts = [torch.arange(self.prompt), *(self.prompt + torch.arange(length) for length in self.continuations)]
        return torch.cat(parts)[None]

    def forward(
        self, attend: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Attend within the prompt once, and from every continuation to the prompt and to itself."""
        sizes = (self.prompt, *self.continuations)
        (q_prompt, *qs), (k_prompt, *ks), (v_prompt, *vs) = (states.split(sizes, dim=2) for states in (q, k, v))
        parts = [attend(q_prompt, k_prompt, v_prompt, _causal(self.prompt, self.prompt, q), **options)]
        for q_own, k_own, v_own in zip(qs, ks, vs, strict=True):
            keys, values = torch.cat((k_prompt, k_own), dim=2), torch.cat((v_prompt, v_own), dim=2)
            parts.append(attend(q_own, keys, values, _causal(q_own.shape[2], keys.shape[2], q), **options))
        return torch.cat(parts, dim=1)


def _causal(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask: the last query sees every key."""
    mask = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu(keys - queries + 1)[None, None]
