"""`transformers.own-positions`: packed samples are not looked for in positions that the model has counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import model_surgery_patches as patches
from surgery.step.positions import counted

__all__ = ["pass_counted"]


def positions_are_read() -> bool:
    """Whether positions are looked at: those on meta cannot be."""
    from transformers import masking_utils

    try:
        masking_utils.find_packed_sequence_indices(_on_meta())
    except RuntimeError:  # of torch, which has no values there
        return True
    return False


def check_reads_others() -> None:
    """Raise RuntimeError if positions that a caller gives are not looked at any more."""
    from transformers import masking_utils

    found = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]]))
    if found is None or found.tolist() != [[0, 0, 1]]:
        raise RuntimeError(f"expected two packed samples to be found, found {found}")


def _on_meta() -> torch.Tensor:
    return torch.arange(3, device="meta").unsqueeze(0)


@patches.register(
    "transformers.own-positions",
    target="transformers.masking_utils:find_packed_sequence_indices",
    reason="a model looks for packed samples in positions that it has counted itself, and waits for the GPU for it",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/masking_utils.py",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(position_ids)",
    fingerprint="4ebce2dc96d9e504",
    optional=True,
    on_unknown="skip",
    on_drift="skip",
    probe=positions_are_read,
    verify=check_reads_others,
)
def pass_counted(
    wrapped: Callable[..., torch.Tensor | None], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Find none where the model has counted."""
    if not torch.compiler.is_compiling() and counted(args[0] if args else kwargs["position_ids"]):
        return None
    return wrapped(*args, **kwargs)
