"""Copies of the object at one place, such as `from x import f` makes: found, rewritten, restored. Imports nothing."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from .target import MISSING, Kind, Place

__all__ = ["Copies", "Copy"]

_dict_of_class: Final[Callable[[type], Any]] = type.__dict__["__dict__"].__get__


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy:
    """One entry of a module, or of a class, dictionary or list there, that holds the object of another place."""

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


def _copies(is_wanted: Callable[[object], bool]) -> Iterator[Copy]:
    """Find every entry of a loaded module, or of a class, dictionary or list stored in one, that holds a wanted object.

    One level deep, each container once. `__dict__`s are read directly, so that lazy modules (those of transformers,
    `importlib.util.LazyLoader`) are not triggered.
    """
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        try:
            entries = object.__getattribute__(module, "__dict__")
        except AttributeError:  # anything can be put into sys.modules
            continue
        if type(entries) is not dict or id(entries) in seen:
            continue
        seen.add(id(entries))
        for key, value in list(entries.items()):
            if is_wanted(value):
                yield Copy(module=name, path=key, container=entries, key=key)
            elif id(value) not in seen and (items := _items(value)):
                seen.add(id(value))
                form = "{}.{}" if issubclass(type(value), type) else "{}[{!r}]"
                found = (inner for inner, held in items if is_wanted(held))
                yield from (Copy(module=name, path=form.format(key, one), container=value, key=one) for one in found)


def _items(value: Any) -> list[tuple[Any, Any]]:
    # `issubclass` of the `type`: isinstance reads the object's `__class__`, and some objects warn about that.
    if issubclass(type(value), type):
        return list(_dict_of_class(value).items())
    if type(value) is dict:
        return list(value.items())
    return list(enumerate(value)) if type(value) is list else []


_COPIED: Final = (Kind.FUNCTION, Kind.METHOD, Kind.STATICMETHOD, Kind.CLASS)


class Copies:
    """The copies of the object at one place, by identity: of the original, and of installed objects.

    Not found: copies inside closures, partials, default arguments and instances, and copies of a classmethod or
    property, since each access makes a new object.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._original = _original(place)
        # Weak references: a slot may live as long as the process, and is recomposed whenever its patches change.
        self._installed: list[weakref.ref[Any]] = []
        self._rewritten: list[tuple[Copy, object]] = []
        self._engaged = False

    def note(self, installed: object) -> None:
        """Record that `installed`, an object composed for this place alone, is or was installed there."""
        if self._place.kind != Kind.CLASS:
            self._remember(_stored(installed))

    def of_original(self, spared: frozenset[str] = frozenset()) -> list[Copy]:
        """The copies that hold the original, except in the modules `spared`."""
        return self._find([self._original], spared)

    def of_installed(self) -> list[Copy]:
        """The copies that hold an object that is or was installed: rewritten ones, and copies made since."""
        return self._find(self._alive())

    def rewrite(self, installed: object, spared: frozenset[str]) -> None:
        """Make every copy of the original, or of an object installed earlier, hold the object installed now."""
        self._engaged = True
        # The wrapper may return a class that was already bound elsewhere. Those are not copies of it.
        if not self._find([installed]):
            self._remember(_stored(installed))
        self._move_rewritten(_stored(installed))
        for copy in self.of_original(spared):
            self._rewritten.append((copy, _stored(installed)))
            copy.write(_stored(installed))
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
        for position, (copy, written) in enumerate(self._rewritten):
            if copy.read() is written:
                self._rewritten[position] = copy, held
                copy.write(held)

    def _refresh(self, installed: object) -> None:
        current = _stored(installed)
        for copy in self._find([past for past in self._alive() if past is not current]):
            copy.write(current)

    def _remember(self, stored: Any) -> None:
        alive = self._alive()
        if self._original is MISSING or any(stored is known for known in (self._original, *alive)):
            return
        self._installed = [weakref.ref(known) for known in (*alive, stored)]

    def _alive(self) -> list[object]:
        return [value for ref in self._installed if (value := ref()) is not None]

    def _find(self, wanted: Sequence[object], spared: frozenset[str] = frozenset()) -> list[Copy]:
        if self._original is MISSING or not wanted:
            return []
        ids = frozenset(map(id, wanted))
        found = (copy for copy in _copies(lambda value: id(value) in ids) if copy.module not in spared)
        return [copy for copy in found if not self._is_the_place(copy)]

    def _is_the_place(self, copy: Copy) -> bool:
        owner, name = self._place.owner, self._place.name
        container = vars(owner) if isinstance(owner, ModuleType) else owner
        return copy.container is container and name in (copy.key, f"[{copy.key!r}]")


def _original(place: Place) -> Any:
    if place.kind not in _COPIED:
        return MISSING
    # Copies of an inherited attribute belong to the base. A module that makes attributes on access has no base.
    inherited = place.found if isinstance(place.owner, ModuleType) else MISSING
    return _stored(inherited if place.own is MISSING else place.own)


def _stored(value: Any) -> Any:
    """The object that a copy of an attribute with this `value` holds."""
    return value.__func__ if type(value) is staticmethod else value
