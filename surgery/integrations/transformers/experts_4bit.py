"""`transformers.experts-4bit`: experts whose weights are packed find their forward, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_surgery_patches as patches
from surgery.quantizers.experts import IMPLEMENTATION
from surgery.quantizers.grouped import experts_forward

__all__ = ["find_forward"]

ID = "transformers.experts-4bit"


def forward_is_unknown() -> bool:
    """Whether transformers refuses the name of the forward."""
    try:
        _find(IMPLEMENTATION)
    except KeyError:
        return True
    return False


def check_finds_each() -> None:
    """Raise RuntimeError if not the forward is found, or another for experts that are not packed."""
    found, other = _find(IMPLEMENTATION), _find("eager")
    if (found, other) != (experts_forward, forward_is_unknown):
        raise RuntimeError(f"expected the forward of experts in 4 bits and that of the class, found {found}, {other}")


def _find(name: str) -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS.get_interface(name, forward_is_unknown)


@patches.register(
    ID,
    target="transformers.integrations.moe:ExpertsInterface.get_interface",
    reason="the forwards that transformers has for experts read 16-bit weights",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/integrations/moe.py",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(self, experts_implementation, default)",
    fingerprint="dda82f3c74ea091e",
    probe=forward_is_unknown,
    verify=check_finds_each,
)
def find_forward(
    wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """The forward of experts in 4 bits if it is asked for by its name, which the configuration of a module has."""
    name = args[0] if args else kwargs["experts_implementation"]
    if name == IMPLEMENTATION:
        return experts_forward
    found: Callable[..., Any] = wrapped(*args, **kwargs)
    return found
