"""`peft.no-merge-before-fill`: adapters of a model on meta are not merged into weights that are not there."""

from __future__ import annotations

from typing import Any, NoReturn

import model_surgery_patches as patches
from surgery.errors import NotFilledError

__all__ = ["refuse"]


@patches.register(
    "peft.no-merge-before-fill",
    target="peft.tuners.tuners_utils:BaseTuner.merge_adapter",
    reason="adapters merged into weights on meta are lost without a word when these are filled",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py",
    requires={"peft": ">=0.18"},
    subject=lambda instance, _args, _kwargs: instance.model,
)
def refuse(_wrapped: object, _instance: object, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> NoReturn:
    """Raise `NotFilledError`."""
    raise NotFilledError("merge_adapter()")
