"""`transformers.fill-at-move`: Trainer fills a bound model where it would move it to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_surgery_patches as patches
from surgery.bound import bound_in, fill

__all__ = ["fill_at_move"]

ID = "transformers.fill-at-move"


@patches.register(
    ID,
    target="transformers.trainer:Trainer._move_model_to_device",
    reason="Trainer moves a model in 16 bits to its device before it is prepared; what is on meta cannot be moved",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(self, model, device)",
    on_unknown="skip",
    on_drift="skip",
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
