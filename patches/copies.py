"""Copies of the object at one place, such as `from x import f` makes: found, rewritten, restored. Imports nothing."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from .target import MISSING, Kind, Place

__all__ = ["Binding", "Copies", "bindings"]

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


_COPIED: Final = (Kind.FUNCTION, Kind.METHOD, Kind.STATICMETHOD, Kind.CLASS)


class Copies:
    """The other bindings of the object at one place, by identity: of the original, and of installed objects.

    Not found: copies inside closures, partials, default arguments and instances, and copies of a classmethod or
    property, since each access makes a new object.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._original = _original(place)
        # Weak references: a slot may live as long as the process, and is recomposed whenever its patches change.
        self._installed: list[weakref.ref[Any]] = []
        self._rewritten: list[tuple[Binding, object]] = []
        self._engaged = False

    def note(self, installed: object) -> None:
        """Record that `installed`, an object composed for this place alone, is or was installed there."""
        if self._place.kind != Kind.CLASS:
            self._remember(_stored(installed))

    def of_original(self, spared: frozenset[str] = frozenset()) -> list[Binding]:
        """The bindings that hold the original, except in the modules `spared`."""
        return self._find([self._original], spared)

    def of_installed(self) -> list[Binding]:
        """The bindings that hold an object that is or was installed: rewritten ones, and copies made since."""
        return self._find(self._alive())

    def rewrite(self, installed: object, spared: frozenset[str]) -> None:
        """Make every copy of the original, or of an object installed earlier, hold the object installed now."""
        self._engaged = True
        # The wrapper may return a class that was already bound elsewhere. Those bindings are not copies.
        if not self._find([installed]):
            self._remember(_stored(installed))
        self._move_rewritten(_stored(installed))
        for binding in self.of_original(spared):
            self._rewritten.append((binding, _stored(installed)))
            binding.write(_stored(installed))
        self._refresh(installed)

    def restore(self, installed: object) -> None:
        """Restore the original to rewritten copies, and set copies made since to the object at the place now.

        A copy that somebody else has changed since is left alone. Does nothing if nothing was rewritten.
        """
        if not self._engaged:
            return
        self._move_rewritten(self._original)
        self._refresh(installed)
        self._rewritten.clear()
        self._engaged = False

    def _move_rewritten(self, held: object) -> None:
        for position, (binding, written) in enumerate(self._rewritten):
            if binding.read() is written:
                self._rewritten[position] = binding, held
                binding.write(held)

    def _refresh(self, installed: object) -> None:
        current = _stored(installed)
        for binding in self._find([past for past in self._alive() if past is not current]):
            binding.write(current)

    def _remember(self, stored: Any) -> None:
        alive = self._alive()
        if self._original is MISSING or any(stored is known for known in (self._original, *alive)):
            return
        self._installed = [weakref.ref(known) for known in (*alive, stored)]

    def _alive(self) -> list[object]:
        known = [ref() for ref in self._installed]
        return [value for value in known if value is not None]

    def _find(self, wanted: Sequence[object], spared: frozenset[str] = frozenset()) -> list[Binding]:
        if self._original is MISSING or not wanted:
            return []
        ids = frozenset(map(id, wanted))
        found = (binding for binding in bindings(lambda value: id(value) in ids) if binding.module not in spared)
        return [binding for binding in found if not self._is_the_place(binding)]

    def _is_the_place(self, binding: Binding) -> bool:
        owner, name = self._place.owner, self._place.name
        container = vars(owner) if isinstance(owner, ModuleType) else owner
        return binding.container is container and name in (binding.key, f"[{binding.key!r}]")


def _original(place: Place) -> Any:
    if place.kind not in _COPIED:
        return MISSING
    # Copies of an inherited attribute belong to the base. A module that makes attributes on access has no base.
    inherited = place.found if isinstance(place.owner, ModuleType) else MISSING
    return _stored(inherited if place.own is MISSING else place.own)


def _stored(value: Any) -> Any:
    """The object that a copy of an attribute with this `value` holds."""
    return value.__func__ if type(value) is staticmethod else value
