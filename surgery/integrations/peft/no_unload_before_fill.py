"""`peft.no-unload-before-fill`: adapters of a model on meta are not merged into weights that are not there."""

from __future__ import annotations

from typing import Any, NoReturn

import model_surgery_patches as patches
from surgery.errors import NotFilledError
from surgery.integrations.peft.adapters_of_meta import adapted_specimen

__all__ = ["refuse"]


def nothing_is_said() -> bool:
    """Whether PEFT merges an adapter into a weight on meta, and does not complain."""
    try:
        adapted_specimen(device="meta").merge_and_unload()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def check_refuses() -> None:
    """Raise RuntimeError if merging is not refused."""
    try:
        refuse(None, None, (), {})
    except NotFilledError:
        return
    raise RuntimeError("expected merge_and_unload() to be refused")


@patches.register(
    "peft.no-unload-before-fill",
    target="peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge",
    reason="adapters merged into weights on meta are lost without a word when these are filled",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py",
    requires={"peft": ">=0.18,<0.22"},
    signature="(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None)",
    fingerprint=("2c3069cf77f1e6ac", "9dad0399901c43d0", "5873fee9064cccb6"),  # until 0.18, until 0.20, since 0.21
    probe=nothing_is_said,
    verify=check_refuses,
    subject=lambda instance, _args, _kwargs: instance.model,
)
def refuse(_wrapped: object, _instance: object, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> NoReturn:
    """Raise `NotFilledError`."""
    raise NotFilledError("merge_and_unload()")
