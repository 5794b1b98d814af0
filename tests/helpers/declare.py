"""Short ways to declare patches of the fake library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches

__all__ = ["FUNCTIONS", "LAYERS", "declare", "tagging"]

FUNCTIONS = "tests.helpers.fake_upstream.functions"
LAYERS = "tests.helpers.fake_upstream.layers"


def tagging(tag: str) -> Callable[..., Any]:
    """A wrapper that returns `(tag, result)`, so that nesting shows in the result."""

    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        return tag, wrapped(*args, **kwargs)

    return wrapper


def declare(tag: str, target: str, **fields: Any) -> patches.Patch:
    """The patch `fake.<tag>`, which tags what the target returns."""
    declared = {"id": f"fake.{tag}", "wrapper": tagging(tag), "reason": "a test", **fields}
    return patches.Patch(target=target, **declared)
