"""`transformers.fill-at-move`: Trainer fills a bound model where it would move it to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in, fill

__all__ = ["fill_at_move"]

ID = "transformers.fill-at-move"


def meta_is_not_moved() -> bool:
    """Whether Trainer fails to move a model that is on meta."""
    try:
        _move(torch.device("meta"))
    except NotImplementedError:  # of torch, for a copy from meta
        return True
    return False


def check_moves_others() -> None:
    """Raise RuntimeError if a model that is not bound is not moved any more."""
    if _move(torch.device("cpu")).weight.device != torch.device("cpu"):
        raise RuntimeError("expected Trainer to move a model that has its weights")


def _move(start: torch.device) -> Any:
    from types import SimpleNamespace

    from transformers import Trainer

    with torch.random.fork_rng(devices=()):
        model = nn.Linear(1, 1, device=start)
    trainer: Any = SimpleNamespace(args=SimpleNamespace(parallel_mode=None))
    Trainer._move_model_to_device(trainer, model, torch.device("cpu"))
    return model


@patches.register(
    ID,
    target="transformers.trainer:Trainer._move_model_to_device",
    reason="Trainer moves a model in 16 bits to its device before it is prepared; what is on meta cannot be moved",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(self, model, device)",
    fingerprint="ab2696173b6f834f",
    on_unknown="skip",
    on_drift="skip",
    probe=meta_is_not_moved,
    verify=check_moves_others,
    subject=lambda _instance, args, kwargs: args[0] if args else kwargs["model"],
)
def fill_at_move(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fill a bound model on the device, whole on every rank; under FSDP leave it until it is prepared."""
    model, device = (*args, *kwargs.values())
    if bound_in(model) is None:
        patches.passed(ID)
        return wrapped(*args, **kwargs)
    if not instance.is_fsdp_enabled:
        fill(model, device=device)
    return None
