"""Cells: the one stored value that a patch replaces, read and written without side effects."""

from __future__ import annotations

import enum
from collections.abc import MutableMapping, MutableSequence
from types import FunctionType
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

__all__ = ["MISSING", "AttributeCell", "Cell", "DefaultCell", "ItemCell", "Missing", "has_default"]


class Missing(enum.Enum):
    """The type of `MISSING`, which marks an attribute that is absent from a `__dict__` (None is a value)."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "<missing>"


MISSING: Final = Missing.MISSING


class Cell(Protocol):
    """A place that stores one value."""

    def read(self) -> Any:
        """The stored object itself, or MISSING."""

    def write(self, value: Any) -> None:
        """Store `value`; MISSING deletes the cell, which only attributes support."""


class AttributeCell:
    """An entry of the `__dict__` of a module, class, or other object: never bound, never inherited."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name

    def read(self) -> Any:
        """Read `owner.__dict__[name]`, or MISSING."""
        return self._owner.__dict__.get(self._name, MISSING)

    def write(self, value: Any) -> None:
        """Call `setattr`, or `delattr` for MISSING."""
        if value is MISSING:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, value)


class ItemCell:
    """An item of a dictionary or a list. Replacing the item of a dictionary keeps its position."""

    def __init__(self, container: MutableMapping[Any, Any] | MutableSequence[Any], key: Any) -> None:
        self._container = container
        self._key = key

    def read(self) -> Any:
        """Read the item, or MISSING; never creates one, as a `defaultdict` would."""
        if isinstance(self._container, MutableMapping):
            return self._container.get(self._key, MISSING)
        in_range = isinstance(self._key, int) and 0 <= self._key < len(self._container)
        return self._container[self._key] if in_range else MISSING

    def write(self, value: Any) -> None:
        """Store the item."""
        self._container[self._key] = value


class DefaultCell:
    """The default of one parameter of a Python function.

    The tuple `__defaults__` is immutable, so writing makes a new one. When all items are again what they were
    before the first write, the original tuple is put back, whatever the order of writes.
    """

    _first: Final[WeakKeyDictionary[FunctionType, tuple[Any, ...]]] = WeakKeyDictionary()

    def __init__(self, function: FunctionType, parameter: str) -> None:
        self._function = function
        self._parameter = parameter
        self._keyword_only = parameter in (function.__kwdefaults__ or {})

    def read(self) -> Any:
        """Read the default, or MISSING if somebody has removed it."""
        if self._keyword_only:
            return (self._function.__kwdefaults__ or {}).get(self._parameter, MISSING)
        position = self._position()
        return MISSING if position is None else (self._function.__defaults__ or ())[position]

    def write(self, value: Any) -> None:
        """Make `value` the default. Raises LookupError if the parameter no longer has a default."""
        if self._keyword_only:
            present_keywords = self._function.__kwdefaults__ or {}
            present_keywords[self._parameter] = value
            self._function.__kwdefaults__ = present_keywords
            return
        position, present = self._position(), self._function.__defaults__ or ()
        if position is None:
            raise LookupError(f"{self._function.__qualname__}() has no default for {self._parameter!r} any more")
        first = self._first.setdefault(self._function, present)
        wanted = (*present[:position], value, *present[position + 1 :])
        if len(first) == len(wanted) and all(a is b for a, b in zip(first, wanted, strict=True)):
            self._function.__defaults__ = self._first.pop(self._function)
        else:
            self._function.__defaults__ = wanted

    def _position(self) -> int | None:
        return _position(self._function, self._parameter)


def has_default(function: FunctionType, parameter: str) -> bool:
    """Whether the function itself, not one that it wraps, has a default for the parameter."""
    return parameter in (function.__kwdefaults__ or {}) or _position(function, parameter) is not None


def _position(function: FunctionType, parameter: str) -> int | None:
    """The index of the parameter in `__defaults__`, which covers the last positional parameters."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    with_default = positional[len(positional) - len(function.__defaults__ or ()) :]
    return with_default.index(parameter) if parameter in with_default else None
