"""Patches of that library, and a bundle of them, found through entry points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches

REQUIRES = {"acme-render": ">=2,<3"}


@patches.register(
    "acme.wide", kind="value", target="acme_render:WIDTH", reason="rules are too short", requires=REQUIRES
)
def wide(wrapped: Callable[[], int], _instance: None, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> int:
    return 2 * wrapped()


@patches.register("acme.loud", target="acme_render:heading", reason="headings are hard to see", requires=REQUIRES)
def loud(wrapped: Callable[..., str], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return wrapped(*args, **kwargs).upper()


@patches.register("acme.of-what-is-absent", target="acme_engine.core:start", reason="an engine that is not installed")
def of_what_is_absent(
    wrapped: Callable[..., Any], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return wrapped(*args, **kwargs)


patches.bundle("acme-render", ["acme.wide", "acme.loud"], atomic=True)
patches.bundle("acme-engine", ["acme.loud", "acme.of-what-is-absent"], atomic=True)
