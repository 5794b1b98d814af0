"""Registered patches of the fake library, and what a worker that replays a manifest sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS
from tests.helpers.fake_upstream import functions

__all__ = ["report"]

REQUIRES = {"wrapt": ">=1"}


@patches.register("fake.replayed-scale", target=f"{FUNCTIONS}:scale", reason="a test", requires=REQUIRES)
def tag_scale(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    return "replayed-scale", wrapped(*args, **kwargs)


@patches.register("fake.replayed-forward", target=f"{LAYERS}:Base.forward", reason="a test", requires=REQUIRES)
def tag_forward(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    return "replayed-forward", wrapped(*args, **kwargs)


@patches.register(
    "fake.replayed-obsolete", target=f"{FUNCTIONS}:describe", reason="a test", requires=REQUIRES, probe=lambda: False
)
def tag_describe(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    return "replayed-obsolete", wrapped(*args, **kwargs)


def report() -> tuple[Any, Any, str]:
    """What the target returns before and after replaying the manifest in the environment; the digest then."""
    before = functions.scale(2)
    patches.replay_from_environment()
    return before, functions.scale(2), patches.digest()
