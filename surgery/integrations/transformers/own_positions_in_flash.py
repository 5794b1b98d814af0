"""`transformers.own-positions-in-flash`: nor are they in each layer, where attention is of the flash family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import model_surgery_patches as patches
from surgery.step.positions import are_counted

__all__ = ["pass_counted"]


def positions_are_read() -> bool:
    """Whether the answer is made of the positions' values."""
    return isinstance(_asked(torch.arange(3).unsqueeze(0)), torch.Tensor)


def check_reads_others() -> None:
    """Raise RuntimeError if positions that a caller gives are not looked at any more."""
    if not _asked(torch.tensor([[0, 1, 0]])):
        raise RuntimeError("expected two packed samples to be found, found one")


def _asked(position_ids: torch.Tensor) -> Any:
    from transformers import modeling_flash_attention_utils as upstream

    return upstream._is_packed_sequence(position_ids, batch_size=1)


@patches.register(
    "transformers.own-positions-in-flash",
    target="transformers.modeling_flash_attention_utils:_is_packed_sequence",
    reason="every layer looks for packed samples in positions that the model has counted, and waits for the GPU for it",
    upstream=(
        "https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/modeling_flash_attention_utils.py"
    ),
    requires={"transformers": ">=5.17,<5.25"},
    signature="(position_ids, batch_size)",
    fingerprint=("2d926f01be736709", "7bbe196ee71e560b"),
    optional=True,
    on_unknown="skip",
    on_drift="skip",
    probe=positions_are_read,
    verify=check_reads_others,
)
def pass_counted(wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Say no where the model has counted."""
    if not torch.compiler.is_compiling() and are_counted(args[0] if args else kwargs["position_ids"]):
        return False
    return wrapped(*args, **kwargs)
