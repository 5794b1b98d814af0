"""Overlays: the relation of a foreign object to the installed object that it replaces."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any, Final

from .target import Place

__all__ = ["is_redefinition", "leads_to"]

_MAX_DEPTH: Final = 8
_LINKS: Final = ("__wrapped__", "__func__", "fget", "fset", "fdel")


def leads_to(found: object, wanted: Sequence[object]) -> bool:
    """Whether `found` calls, or at least refers to, one of `wanted`.

    Follows `__wrapped__`, bound and static methods, properties, partials, and references of a function: closure,
    defaults, globals that its code names.
    """
    seen: set[int] = set()
    frontier = [found]
    for _ in range(_MAX_DEPTH):
        if any(value is goal for value in frontier for goal in wanted):
            return True
        seen.update(map(id, frontier))
        frontier = [value for source in frontier for value in _referred(source) if id(value) not in seen]
    return False


def _referred(value: object) -> Iterator[object]:
    for name in _LINKS:
        linked = getattr(value, name, None)
        if linked is not None:
            yield linked
    if isinstance(value, functools.partial):
        yield value.func
    if isinstance(value, type):
        yield from value.__bases__
    # `type`, not isinstance: a wrapt proxy imitates a function, but only its `__wrapped__` is relevant.
    if type(value) is FunctionType:
        yield from _referred_by_function(value)


def _referred_by_function(function: FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    names = (name for name in function.__code__.co_names if name in function.__globals__)
    yield from (function.__globals__[name] for name in names)


def is_redefinition(found: Any, place: Place) -> bool:
    """Whether `found` is the original function or class, redefined from the same file by a reload."""
    original = place.own
    if isinstance(found, type) and isinstance(original, type) and found is not original:
        return (found.__module__, found.__qualname__) == (original.__module__, original.__qualname__)
    if type(found) is not FunctionType or type(original) is not FunctionType or found is original:
        return False
    if "<locals>" in found.__code__.co_qualname:  # made by a function, which may make several with equal names
        return False
    return (found.__module__, found.__qualname__, found.__code__.co_filename) == (
        original.__module__,
        original.__qualname__,
        original.__code__.co_filename,
    )
