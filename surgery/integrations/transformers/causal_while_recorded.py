"""`transformers.causal-while-recorded`: attention without padding needs no mask while a CUDA graph is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import model_surgery_patches as patches
from surgery.step.positions import called

__all__ = ["leave_out_mask"]

#: Parameters of the target.
NAMES = ("padding_mask", "q_length", "kv_length", "q_offset", "kv_offset", "local_attention_size")


def mask_is_made() -> bool:
    """Whether a mask that masks nothing but the future is made where values cannot be read."""
    from transformers import masking_utils

    with _recording():
        return not masking_utils._ignore_causal_mask_sdpa(None, 4, 4, 0, 0)


def check_leaves_out() -> None:
    """Raise RuntimeError if the wrapper makes one still, or leaves one out that a window needs."""

    def upstream(*_args: object) -> bool:
        return False

    found = [leave_out_mask(upstream, None, (None, 4, 4, 0, 0, window), {}) for window in (None, 8, 4)]
    if found != [True, True, False]:
        raise RuntimeError(f"expected no mask where there is no padding, and one for a window, found {found}")


@contextmanager
def _recording() -> Iterator[None]:
    """A block in which transformers takes a CUDA graph to be recorded."""
    from transformers import masking_utils

    stock = vars(masking_utils)["is_tracing"]
    vars(masking_utils)["is_tracing"] = lambda tensor=None: tensor is None or stock(tensor)
    try:
        yield
    finally:
        vars(masking_utils)["is_tracing"] = stock


@patches.register(
    "transformers.causal-while-recorded",
    target="transformers.masking_utils:_ignore_causal_mask_sdpa",
    reason="while a CUDA graph is recorded, a causal mask is made without need: attention runs other, slower kernels",
    upstream="https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/masking_utils.py",
    requires={"transformers": ">=5.17,<5.18"},
    signature="(padding_mask, q_length, kv_length, q_offset, kv_offset, local_attention_size=None)",
    fingerprint="3a4f6938bf766b88",
    subject=called,
    optional=True,
    on_unknown="skip",
    on_drift="skip",
    probe=mask_is_made,
    verify=check_leaves_out,
)
def leave_out_mask(
    wrapped: Callable[..., bool], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Answer from shapes alone where there is no padding, as upstream does while nothing is recorded."""
    given = dict(zip(NAMES, args, strict=False)) | kwargs
    if given["padding_mask"] is not None or torch.compiler.is_compiling() or torch._C._is_tracing():
        return wrapped(*args, **kwargs)
    queries, keys, window = given["q_length"], given["kv_length"], given.get("local_attention_size")
    if window is not None and keys >= window:
        return False
    return bool(queries in (1, keys) or given["q_offset"] == 0)
