"""Patches of PEFT for a model that waits for its weights; each acts on that model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

import model_surgery_patches as patches
from surgery.adapters.attach import appearing_real
from surgery.errors import NotFilledError

__all__ = ["WAITING"]

#: Patches that a bound model has until it is filled.
WAITING = ("peft.adapters-of-meta", "peft.no-merge-before-fill", "peft.no-unload-before-fill")

_PEFT = "https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py"


def _given_model(_instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["model"]


@patches.register(
    "peft.adapters-of-meta",
    target="peft.tuners.tuners_utils:BaseTuner.inject_adapter",
    reason="PEFT moves new adapters to the device of their base weight; on meta their initial values are lost",
    upstream=_PEFT,
    requires={"peft": ">=0.18"},
    subject=_given_model,
)
def keep_initial_values(
    wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Keep adapters on the CPU with their values, around base weights on meta."""
    model: nn.Module = _given_model(_instance, args, kwargs)
    for config in _instance.peft_config.values():
        for name in ("use_dora", "trainable_token_indices"):
            if getattr(config, name, None):
                raise NotFilledError(f"{name} of LoRA")
    with appearing_real(model):
        return wrapped(*args, **kwargs)


def _refusing(use: str) -> Callable[..., NoReturn]:
    """A wrapper that raises `NotFilledError` for `use`."""

    def refuse(
        _wrapped: Callable[..., Any], _instance: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]
    ) -> NoReturn:
        raise NotFilledError(use)

    return refuse


for _id, _method, _use in (
    ("peft.no-merge-before-fill", "merge_adapter", "merge_adapter()"),
    ("peft.no-unload-before-fill", "_unload_and_optionally_merge", "merge_and_unload()"),
):
    patches.register(
        _id,
        target=f"peft.tuners.tuners_utils:BaseTuner.{_method}",
        reason="adapters merged into weights on meta are lost without a word when these are filled",
        upstream=_PEFT,
        requires={"peft": ">=0.18"},
        subject=lambda instance, _args, _kwargs: instance.model,
    )(_refusing(_use))
