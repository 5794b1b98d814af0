"""Snapshots of `__dict__`s, compared by presence and identity."""

from __future__ import annotations

from types import ModuleType

__all__ = ["Snapshot"]

_MISSING = object()
# Python keeps this on a class once an instance has been copied or pickled.
_CACHED = frozenset({"__slotnames__"})


class Snapshot:
    """What the owners' `__dict__`s hold now."""

    def __init__(self, *owners: type | ModuleType) -> None:
        self._taken = [(owner, dict(vars(owner))) for owner in owners]

    def restore(self) -> None:
        """Put back what was there, so that one failing test does not fail those after it."""
        for owner, before in self._taken:
            for name in vars(owner).keys() - before.keys():
                delattr(owner, name)
            for name in (name for name, value in before.items() if vars(owner).get(name, _MISSING) is not value):
                setattr(owner, name, before[name])

    def differences(self) -> list[str]:
        """One line for each attribute that has come, gone, or become another object since."""
        return [
            f"{owner.__name__}.{name}"
            for owner, before in self._taken
            for name in sorted(before.keys() | vars(owner).keys())
            if name not in _CACHED and before.get(name, _MISSING) is not vars(owner).get(name, _MISSING)
        ]
