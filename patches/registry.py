"""The registry: patches by id, imported only on request."""

from __future__ import annotations

import difflib
import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from .builtin import BUILTIN
from .errors import DuplicatePatchError, UnknownPatchError
from .patch import Patch, Wrapper

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["ENTRY_POINT_GROUP", "REGISTRY", "Registry"]

ENTRY_POINT_GROUP: Final = "patches.registry"
_W = TypeVar("_W", bound=Callable[..., Any])


def _installed_entry_points() -> Iterable[EntryPoint]:
    # Imported here: most programs never need it, and it would take a third of the time of `import patches`.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


class Registry:
    """Patches by id.

    An id is looked up among the patches registered so far, then in `builtin` (id -> module that registers it),
    then among the entry points of the group `patches.registry` (name: the id; value: a module that registers
    it, or `module:attribute` with the Patch). An id has one claimant: two raise DuplicatePatchError, which
    names both.
    """

    def __init__(
        self,
        builtin: Mapping[str, str] | None = None,
        find_entry_points: Callable[[], Iterable[EntryPoint]] = _installed_entry_points,
    ) -> None:
        self._builtin = dict(builtin or {})
        self._find_entry_points = find_entry_points
        self._offered: dict[str, EntryPoint] = {}
        self._patches: dict[str, Patch] = {}
        # Guards the dictionary only; never held during an import, which may wait for another thread.
        self._lock = threading.Lock()

    @overload
    def register(self, patch: Patch, /) -> Patch: ...
    @overload
    def register(self, id: str, /, *, target: str, reason: str, **fields: Any) -> Callable[[_W], _W]: ...
    def register(self, patch: Patch | str, /, **fields: Any) -> Any:
        """Register a Patch and return it, or return a decorator that registers a wrapper and returns it
        unchanged.

        As a decorator it takes the fields of `Patch`. Raises DuplicatePatchError if the id is taken. A module may
        register its own patch again, as happens when it is reloaded or a notebook cell is run again.
        """
        if isinstance(patch, Patch):
            self._add(patch)
            return patch

        def decorate(wrapper: Wrapper) -> Wrapper:
            self._add(Patch(id=patch, wrapper=wrapper, **fields))
            return wrapper

        return decorate

    def get(self, patch_id: str) -> Patch:
        """The patch of this id; imports the module that declares it. Raises UnknownPatchError."""
        if patch_id in self._patches:
            return self._patches[patch_id]
        if patch_id in self._builtin:
            importlib.import_module(self._builtin[patch_id])
            return self._expect(patch_id, self._builtin[patch_id])
        offers = [point for point in self._points() if point.name == patch_id]
        if len(offers) > 1:
            raise _duplicate(patch_id, *(_describe(offer) for offer in offers[:2]))
        if offers:
            return self._load(offers[0])
        raise self._unknown(patch_id)

    def ids(self) -> list[str]:
        """All known ids, sorted. Imports nothing."""
        return sorted({*self._patches, *self._builtin, *(point.name for point in self._points())})

    def offer(self, points: Iterable[EntryPoint]) -> None:
        """Add entry points of what is not installed. An installed one of the same name is used instead."""
        self._offered.update({point.name: point for point in points})

    def _points(self) -> list[EntryPoint]:
        installed = {point.name for point in self._find_entry_points()}
        offered = (point for point in self._offered.values() if point.name not in installed)
        return [*self._find_entry_points(), *offered]

    def source(self, patch_id: str) -> str:
        """The source of the patch of this id: a module, or an entry point. Imports nothing."""
        if patch_id in self._patches:
            return self._patches[patch_id].module
        if patch_id in self._builtin:
            return self._builtin[patch_id]
        for point in self._points():
            if point.name == patch_id:
                return _describe(point)
        raise self._unknown(patch_id)

    def _add(self, patch: Patch) -> None:
        reserved = self._builtin.get(patch.id)
        if reserved not in (None, patch.module):
            raise _duplicate(patch.id, str(reserved), patch.claimant)
        with self._lock:
            present = self._patches.setdefault(patch.id, patch)
            if present.claimant != patch.claimant:
                raise _duplicate(patch.id, present.claimant, patch.claimant)
            self._patches[patch.id] = patch

    def _load(self, point: EntryPoint) -> Patch:
        loaded = point.load()
        if isinstance(loaded, Patch) and loaded.id == point.name:
            if self._patches.get(loaded.id) is not loaded:
                self._add(loaded)
            return loaded
        return self._expect(point.name, _describe(point))

    def _expect(self, patch_id: str, source: str) -> Patch:
        if patch_id not in self._patches:
            raise UnknownPatchError(
                f"{source} was to register {patch_id!r} when imported, and did not", patch_id=patch_id
            )
        return self._patches[patch_id]

    def _unknown(self, patch_id: str) -> UnknownPatchError:
        known = self.ids()
        close = difflib.get_close_matches(patch_id, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
        return UnknownPatchError(f"no patch has the id {patch_id!r}; {hint}", patch_id=patch_id, suggestions=close)


def _describe(point: EntryPoint) -> str:
    owner = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed distribution"
    return f"{owner} ({point.value})"


def _duplicate(patch_id: str, first: str, second: str) -> DuplicatePatchError:
    return DuplicatePatchError(
        f"the id {patch_id!r} is claimed twice, by {first} and by {second}; rename one of them",
        patch_id=patch_id,
        claimants=(first, second),
    )


REGISTRY: Final = Registry(builtin=BUILTIN)
