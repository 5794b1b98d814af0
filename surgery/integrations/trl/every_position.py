"""`trl.every-position`: the loss of a call that is recorded is of every position, those that are ignored as zero."""

from __future__ import annotations

from collections.abc import Callable

import torch

import model_surgery_patches as patches
from surgery.step.recording import is_recordable, recordable

__all__ = ["score_every_position"]

ID = "trl.every-position"


def positions_are_chosen() -> bool:
    """Whether positions are chosen on a GPU, by a mask whose values are read."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    has_triton = chunked_logprob._TRITON_AVAILABLE
    chunked_logprob._TRITON_AVAILABLE = True
    try:
        with recordable():
            return bool(utils._use_triton(torch.device("cuda")))
    finally:
        chunked_logprob._TRITON_AVAILABLE = has_triton


def check_takes_all() -> None:
    """Raise RuntimeError if positions are chosen in a call that is recorded."""
    if positions_are_chosen():
        raise RuntimeError("expected every position to be scored, found some chosen")


@patches.register(
    ID,
    # As `add_fused_lm_head` asks; the kernels ask the function that this one was imported from.
    target="trl.trainer.utils:_use_triton",
    aliases="ignore",
    reason="TRL picks the positions that count by their values, which waits for the GPU, and cannot be recorded",
    upstream="https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py",
    requires={"trl": ">=1.16,<1.17"},
    signature="(device)",
    fingerprint="eeca376102fa7ba1",
    optional=True,
    on_unknown="skip",
    on_drift="skip",
    probe=positions_are_chosen,
    verify=check_takes_all,
)
def score_every_position(
    wrapped: Callable[..., bool], _instance: object, args: tuple[torch.device], kwargs: dict[str, torch.device]
) -> bool:
    """Say no in a call that is, or will be, recorded."""
    return not is_recordable() and wrapped(*args, **kwargs)
