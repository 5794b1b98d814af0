"""Snapshots of `__dict__`s, containers and defaults, compared by presence and identity."""

from __future__ import annotations

from collections.abc import MutableMapping
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["Snapshot"]

_MISSING = object()
# Python keeps this on a class once an instance has been copied or pickled.
_CACHED = frozenset({"__slotnames__"})


class Snapshot:
    """What the owners hold now: modules, classes, objects, dictionaries, lists, and functions their defaults."""

    def __init__(self, *owners: Any) -> None:
        self._taken = [(owner, _contents(owner)) for owner in owners]

    def restore(self) -> None:
        """Put back what was there, so that one failing test does not fail those after it."""
        for owner, before in self._taken:
            now = _contents(owner)
            for name in now.keys() - before.keys():
                delattr(owner, name)
            for name in (name for name, value in before.items() if now.get(name, _MISSING) is not value):
                _set(owner, name, before[name])

    def differences(self) -> list[str]:
        """One line for each thing that has come, gone, or become another object since."""
        found = []
        for owner, before in self._taken:
            now = _contents(owner)
            names = [*before, *(name for name in now if name not in before)]
            changed = [name for name in names if before.get(name, _MISSING) is not now.get(name, _MISSING)]
            found += [f"{_name(owner)}.{name}" for name in sorted(map(str, changed)) if name not in _CACHED]
            if list(before) != list(now) and not changed:
                found.append(f"{_name(owner)}: order")
        return found


def _contents(owner: Any) -> dict[Any, Any]:
    if isinstance(owner, MutableMapping):
        return dict(owner)
    if isinstance(owner, list):
        return dict(enumerate(owner))
    if isinstance(owner, FunctionType):
        keyword_only = {f"({name})": value for name, value in (owner.__kwdefaults__ or {}).items()}
        return {"__defaults__": owner.__defaults__, "__kwdefaults__": owner.__kwdefaults__, **keyword_only}
    return dict(vars(owner))


def _set(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, MutableMapping | list):
        owner[name] = value
    elif isinstance(owner, FunctionType) and name.startswith("("):
        owner.__kwdefaults__[name[1:-1]] = value
    else:
        setattr(owner, name, value)


def _name(owner: Any) -> str:
    if isinstance(owner, type | ModuleType | FunctionType):
        return owner.__name__
    return type(owner).__name__
