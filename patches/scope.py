"""Instance scope: the objects to which a patch is limited, held weakly and compared by identity."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import ScopeError
from .patch import Patch

__all__ = ["Scope", "Scoped", "on"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoped:
    """A patch and the objects to limit it to, as made by `on`. Keeps the objects alive."""

    patch: str | Patch
    instances: tuple[object, ...]


def on(patch: str | Patch, instances: Iterable[object]) -> Scoped:
    """Limit a patch to these objects: `transaction(on("a.b", [x, y]), reason=...)`.

    Other objects of the class keep their stock behaviour. The objects are compared by identity, need not be
    hashable, are not changed (they pickle and deepcopy as before; a copy is not covered), and the patch does not
    keep them alive. Raises ScopeError if there are none.
    """
    chosen = tuple(instances)
    if not chosen:
        patch_id = patch if isinstance(patch, str) else patch.id
        raise ScopeError(f"{patch_id!r} was given no instance; expected at least one", patch_id=patch_id)
    return Scoped(patch=patch, instances=chosen)


class Scope:
    """The living objects to which one receipt is limited."""

    __slots__ = ("__weakref__", "_on_empty", "ids")

    def __init__(self, instances: Iterable[object], *, patch_id: str) -> None:
        """Reference the instances weakly. Raises ScopeError for an object that cannot be."""
        self.ids: dict[int, weakref.ref[object]] = {}
        """`id` -> weak reference, of every covered object that is alive."""
        self._on_empty: Callable[[], None] | None = None
        for instance in instances:
            self.ids[id(instance)] = self._watch(instance, patch_id)

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        return f"{len(self)} instance{'' if len(self) == 1 else 's'}"

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the last object is gone: now, or later at any moment."""
        self._on_empty = callback
        if not self.ids:
            callback()

    def _watch(self, instance: object, patch_id: str) -> weakref.ref[object]:
        key = id(instance)

        def forget(_: object) -> None:
            # Runs before the memory, and so the id, can be reused for another object. No lock: it would deadlock.
            self.ids.pop(key, None)
            if not self.ids and self._on_empty is not None:
                self._on_empty()

        try:
            return weakref.ref(instance, forget)
        except TypeError as error:
            raise ScopeError(
                f"{patch_id!r} cannot be limited to an object of type {type(instance).__name__!r}: it cannot "
                "be referenced weakly; apply the patch without `on`, or give it another subject",
                patch_id=patch_id,
            ) from error
