"""Bindings: the places in loaded modules where certain objects are stored. Nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Binding", "bindings"]

_dict_of_class: Final[Callable[[type], Any]] = type.__dict__["__dict__"].__get__


@dataclass(frozen=True, kw_only=True, eq=False)
class Binding:
    """One place that holds an object: an entry of a module, of a class, or of a dictionary or list there."""

    module: str
    path: str
    """`name`, `Class.name`, `TABLE['key']` or `LIST[0]`."""
    container: Any
    key: Any

    def __str__(self) -> str:
        return f"{self.module}:{self.path}"

    def read(self) -> Any:
        """The object that is stored there now, or None."""
        if type(self.container) is list:
            return self.container[self.key] if self.key < len(self.container) else None
        held = _dict_of_class(self.container) if isinstance(self.container, type) else self.container
        return held.get(self.key)

    def write(self, value: object) -> None:
        """Store `value`, bypassing any `__setattr__` of the module or metaclass."""
        if isinstance(self.container, type):
            type.__setattr__(self.container, self.key, value)
        else:
            self.container[self.key] = value


def bindings(is_wanted: Callable[[object], bool]) -> Iterator[Binding]:
    """Find every entry of a loaded module, or of a class, dictionary or list stored in one, that holds a wanted object.

    One level deep, each container once. `__dict__`s are read directly, so that lazy modules (those of transformers,
    `importlib.util.LazyLoader`) are not triggered.
    """
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        entries = _entries_of_module(module)
        if entries is None or id(entries) in seen:
            continue
        seen.add(id(entries))
        for key, value in list(entries.items()):
            if is_wanted(value):
                yield Binding(module=name, path=key, container=entries, key=key)
            else:
                yield from _inside(name, key, value, is_wanted, seen)


def _entries_of_module(module: object) -> dict[str, Any] | None:
    try:
        entries = object.__getattribute__(module, "__dict__")
    except AttributeError:  # anything can be put into sys.modules
        return None
    return entries if type(entries) is dict else None


def _inside(
    module: str, name: str, value: object, is_wanted: Callable[[object], bool], seen: set[int]
) -> Iterator[Binding]:
    # `issubclass` of the `type`: isinstance reads the object's `__class__`, and some objects warn about that.
    kind = type(value)
    is_class = issubclass(kind, type)
    if not (is_class or kind is dict or kind is list) or id(value) in seen:
        return
    seen.add(id(value))
    for key, held in _items(value, is_class=is_class):
        if is_wanted(held):
            path = f"{name}.{key}" if is_class else f"{name}[{key!r}]"
            yield Binding(module=module, path=path, container=value, key=key)


def _items(value: Any, *, is_class: bool) -> list[tuple[Any, Any]]:
    if type(value) is list:
        return list(enumerate(value))
    return list((_dict_of_class(value) if is_class else value).items())
