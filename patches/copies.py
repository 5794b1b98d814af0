"""Copies of the object at one place, such as `from x import f` makes: found, rewritten, restored."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import wrapt

from .bindings import Binding, bindings
from .target import MISSING, Kind, Place

__all__ = ["Copies"]

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
        self._move_rewritten(lambda binding: self._form(installed, binding))
        for binding in self.of_original(spared):
            form = self._form(installed, binding)
            self._rewritten.append((binding, form))
            binding.write(form)
        self._refresh(installed)

    def restore(self, installed: object) -> None:
        """Restore the original to rewritten copies, and set copies made since to the object at the place now.

        A copy that somebody else has changed since is left alone. Does nothing if nothing was rewritten.
        """
        if not self._engaged:
            return
        self._move_rewritten(lambda _: self._original)
        self._refresh(installed)
        self._rewritten.clear()
        self._engaged = False

    def _move_rewritten(self, form: Callable[[Binding], object]) -> None:
        for position, (binding, written) in enumerate(self._rewritten):
            if _core(binding.read()) is _core(written):
                self._rewritten[position] = binding, form(binding)
                binding.write(form(binding))

    def _refresh(self, installed: object) -> None:
        current = _stored(installed)
        for binding in self._find([past for past in self._alive() if past is not current]):
            binding.write(self._form(installed, binding))

    def _form(self, installed: Any, binding: Binding) -> object:
        """The value for a binding, as read from the place: for a method outside a class, the unbound method."""
        stored = _stored(installed)
        binds = isinstance(stored, wrapt.FunctionWrapper) and isinstance(self._place.owner, type)
        return stored.__get__(None, self._place.owner) if binds and not isinstance(binding.container, type) else stored

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
        found = (binding for binding in bindings(lambda value: id(_core(value)) in ids) if binding.module not in spared)
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


def _core(value: Any) -> Any:
    """The installed wrapper, if `value` is a bound form of it, which wrapt makes anew on each access."""
    return value._self_parent if type(value) is wrapt.BoundFunctionWrapper else value
