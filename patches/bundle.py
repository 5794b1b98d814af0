"""Bundles: names for several patches that are used together."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .builtin.bundles import BUNDLES as BUILTIN_BUNDLES
from .errors import DefinitionError, DuplicatePatchError, UnknownPatchError

__all__ = ["BUNDLES", "Bundle", "Bundles"]

# No dot, which every patch id has, so the two cannot be confused.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A name for several patches: ids, names of other bundles, `tag:word`, globs. Resolved at each use.

    Raises DefinitionError if the name has a dot, or the bundle is empty.
    """

    name: str
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise self._refuse("name", "expected a kebab-name without a dot, which ids have")
        if not self.members:
            raise self._refuse("members", "nothing is in it")

    def _refuse(self, field: str, why: str) -> DefinitionError:
        return DefinitionError(f"bundle {self.name!r}, field {field!r}: {why}", patch_id=self.name, field=field)


class Bundles:
    """Bundles by name."""

    def __init__(self, builtin: Mapping[str, Iterable[str]]) -> None:
        self._bundles = {name: Bundle(name=name, members=tuple(members)) for name, members in builtin.items()}
        self._lock = threading.Lock()

    def register(self, name: str, members: Iterable[str], /) -> Bundle:
        """Give several patches one name, which can be used wherever an id can.

        The patches need not be registered yet. Registering the same members again is allowed, as a reloaded module
        does; other members raise DuplicatePatchError.
        """
        if isinstance(members, str):  # a string is a sequence of strings
            why = f"expected a list of ids, bundles or selectors, got the string {members!r}"
            raise DefinitionError(f"bundle {name!r}, field 'members': {why}", patch_id=name, field="members")
        bundle = Bundle(name=name, members=tuple(members))
        with self._lock:
            present = self._bundles.setdefault(name, bundle)
        if present != bundle:
            claims = [", ".join(claim.members) for claim in (present, bundle)]
            raise DuplicatePatchError(
                f"the bundle {name!r} is claimed twice, for {claims[0]}, and for {claims[1]}; rename one of them",
                patch_id=name,
                claimants=claims,
            )
        return bundle

    def get(self, name: str) -> Bundle:
        """The bundle of this name. Raises UnknownPatchError."""
        if name not in self._bundles:
            known = ", ".join(self.names()) or "none"
            raise UnknownPatchError(f"no bundle has the name {name!r}; known: {known}", patch_id=name)
        return self._bundles[name]

    def names(self) -> list[str]:
        """The names of all bundles, sorted."""
        return sorted(self._bundles)


BUNDLES: Final = Bundles(BUILTIN_BUNDLES)
