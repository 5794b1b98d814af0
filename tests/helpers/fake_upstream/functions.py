"""Module-level targets."""

from __future__ import annotations

import math
from typing import Any

limit = 3
floor = math.floor


def scale(x: int, *, by: int = 2) -> int:
    return x * by


def describe(layer: object) -> str:
    return type(layer).__name__


def _on_demand(x: int) -> int:
    return x + 2


def __getattr__(name: str) -> Any:
    if name == "lazy":
        return _on_demand
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
