"""The registry: patches by id, imported only on request; bundles, which name several; and selectors."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack, overload

from .builtin import BUILTIN
from .builtin.bundles import BUNDLES as BUILTIN_BUNDLES
from .errors import CycleError, DefinitionError, DuplicatePatchError, UnknownPatchError
from .patch import Fields, Patch, Wrapper
from .target import Target

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "BUNDLES", "ENTRY_POINT_GROUP", "REGISTRY", "Bundle", "Bundles", "Registry", "atomic_bundles", "is_pattern",
    "select",
]  # fmt: skip

ENTRY_POINT_GROUP: Final = "patches.registry"
_W = TypeVar("_W", bound=Callable[..., Any])
_DEEDS: Final = ("wrapper", "replace", "factory")
# No dot, which every patch id has, so the two cannot be confused.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_TAG: Final = "tag:"
_WILDCARDS: Final = frozenset("*?[")


def _installed_entry_points() -> Iterable[EntryPoint]:
    # Imported here: most programs never need it, and it would take a third of the time of `import patches`.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


class Registry:
    """Patches by id.

    An id is looked up among the patches registered so far, then in `builtin` (id -> module that registers it),
    then among the entry points of the group `patches.registry` (name: the id; value: a module that registers
    it, or `module:attribute` with the Patch). An entry point without a dot in its name is that of a bundle. An id has
    one claimant: two raise DuplicatePatchError, which names both.
    """

    def __init__(
        self,
        builtin: Mapping[str, str] | None = None,
        find_entry_points: Callable[[], Iterable[EntryPoint]] = _installed_entry_points,
    ) -> None:
        self._builtin = dict(builtin or {})
        self._find_entry_points = find_entry_points
        self._offered: dict[str, EntryPoint] = {}
        self._found: list[EntryPoint] = []  # by the last look
        self._patches: dict[str, Patch] = {}
        # Guards the dictionary only; never held during an import, which may wait for another thread.
        self.lock = threading.Lock()

    @overload
    def register(self, patch: Patch, /) -> Patch: ...
    @overload
    def register(
        self, id: str, /, *, target: str | Target | tuple[str | Target, ...], reason: str, **fields: Unpack[Fields]
    ) -> Callable[[_W], _W]: ...
    def register(self, patch: Patch | str, /, **fields: Any) -> Any:
        """Register a Patch and return it, or return a decorator that registers a wrapper and returns it unchanged.

        As a decorator it takes the fields of `Patch`; with one of `replace`, `factory` and kind="delete" among them
        the patch is registered at once. Raises DuplicatePatchError if the id is taken. A module may register its own
        patch again, as happens when it is reloaded or a notebook cell is run again.
        """
        if isinstance(patch, Patch):
            self._add(patch)
            return patch
        if fields.get("kind") == "delete" or any(deed in fields for deed in _DEEDS):
            self._add(Patch(id=patch, **fields))
            return lambda function: function

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
        if all(point.name != patch_id for point in self._found):
            self._found = self._points()  # which takes 4 ms
        offers = [point for point in self._found if point.name == patch_id]
        if len(offers) > 1:
            raise _duplicate(patch_id, *(_describe(offer) for offer in offers[:2]))
        if offers:
            return self._load(offers[0])
        raise self._unknown(patch_id)

    def ids(self) -> list[str]:
        """All known ids, sorted. Imports nothing."""
        return sorted({*self._patches, *self._builtin, *(each.name for each in self._points() if "." in each.name)})

    def offer(self, points: Iterable[EntryPoint]) -> None:
        """Add entry points of what is not installed. An installed one of the same name is used instead."""
        self._offered.update({point.name: point for point in points})
        self._found = []

    def bundles(self) -> dict[str, EntryPoint]:
        """Entry points of bundles, whose names have no dot: name -> a module that registers it."""
        return {point.name: point for point in self._points() if "." not in point.name}

    def _points(self) -> list[EntryPoint]:
        installed = list(self._find_entry_points())
        names = {point.name for point in installed}
        return [*installed, *(point for name, point in self._offered.items() if name not in names)]

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
        with self.lock:
            present = self._patches.setdefault(patch.id, patch)
            if present.claimant != patch.claimant:
                raise _duplicate(patch.id, present.claimant, patch.claimant)
            self._patches[patch.id] = patch

    def _load(self, point: EntryPoint) -> Patch:
        try:
            loaded = point.load()
        except (AttributeError, ImportError) as error:
            other = getattr(sys.modules[__package__], "__shadowed_by__", None)
            advice = f"`import patches` leads to {other} here; `import model_surgery_patches as patches` would not"
            if other is not None:
                error.add_note(advice)
            raise
        if isinstance(loaded, Patch) and loaded.id == point.name:
            if self._patches.get(loaded.id) is not loaded:
                self._add(loaded)
            return loaded
        return self._expect(point.name, _describe(point))

    def _expect(self, patch_id: str, source: str) -> Patch:
        if patch_id not in self._patches:
            why = f"{source} was to register {patch_id!r} when imported, and did not"
            raise UnknownPatchError(why, patch_id=patch_id)
        return self._patches[patch_id]

    def _unknown(self, patch_id: str) -> UnknownPatchError:
        import difflib

        known = self.ids()
        close = tuple(difflib.get_close_matches(patch_id, known))
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
        return UnknownPatchError(f"no patch has the id {patch_id!r}; {hint}", patch_id=patch_id, suggestions=close)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A name for several patches: ids, names of other bundles, `tag:word`, globs. Resolved at each use.

    Raises DefinitionError if the name has a dot, or the bundle is empty.
    """

    name: str
    members: tuple[str, ...]
    atomic: bool = False
    """Whether all members are applied or none: if one would be skipped, applying raises IncompatibleError."""

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
        self.lock = threading.Lock()

    def register(self, name: str, members: Iterable[str], /, *, atomic: bool = False) -> Bundle:
        """Give several patches one name, which can be used wherever an id can; `atomic` ones apply whole or not at all.

        The patches need not be registered yet. Registering the same members again is allowed, as a reloaded module
        does; other members raise DuplicatePatchError.
        """
        if isinstance(members, str):  # a string is a sequence of strings
            why = f"expected a list of ids, bundles or selectors, got the string {members!r}"
            raise DefinitionError(f"bundle {name!r}, field 'members': {why}", patch_id=name, field="members")
        bundle = Bundle(name=name, members=tuple(members), atomic=atomic)
        with self.lock:
            present = self._bundles.setdefault(name, bundle)
        if present != bundle:
            claims = tuple(", ".join(claim.members) for claim in (present, bundle))
            raise DuplicatePatchError(
                f"the bundle {name!r} is claimed twice, for {claims[0]}, and for {claims[1]}; rename one of them",
                patch_id=name,
                claimants=claims,
            )
        return bundle

    def get(self, name: str) -> Bundle:
        """The bundle of this name; imports the module that declares it. Raises UnknownPatchError."""
        offered = REGISTRY.bundles() if name not in self._bundles else {}
        if name in offered:
            offered[name].load()
        if name not in self._bundles:
            known = ", ".join(self.names()) or "none"
            raise UnknownPatchError(f"no bundle has the name {name!r}; known: {known}", patch_id=name)
        return self._bundles[name]

    def names(self) -> list[str]:
        """The names of all bundles, sorted."""
        return sorted({*self._bundles, *REGISTRY.bundles()})


REGISTRY: Final = Registry(builtin=BUILTIN)
BUNDLES: Final = Bundles(BUILTIN_BUNDLES)


def select(*selectors: str, registry: Registry = REGISTRY, bundles: Bundles = BUNDLES) -> list[str]:
    """Resolve selectors to ids, in the order of the selectors, without duplicates.

    A selector is an id; the name of a bundle; a glob over ids (`bitsandbytes.*`), which imports nothing; or
    `tag:word`, which imports every known patch to read its tags. The matches of one selector are sorted; those of a
    bundle keep its order. Raises UnknownPatchError if one matches nothing, CycleError if a bundle contains itself.
    """
    found = [patch_id for selector in selectors for patch_id in _matches(selector, registry, bundles, ())]
    return list(dict.fromkeys(found))


def atomic_bundles(selector: str, bundles: Bundles = BUNDLES) -> list[str]:
    """The names of the atomic bundles in a selector: itself, or inside of it."""
    if "." in selector or _is_search(selector):
        return []
    bundle = bundles.get(selector)
    inner = [name for member in bundle.members for name in atomic_bundles(member, bundles)]
    return [selector, *inner] if bundle.atomic else inner


def is_pattern(selector: str) -> bool:
    """Whether the selector is not an id: a bundle, a glob, or a tag."""
    return "." not in selector or _is_search(selector)


def _is_search(selector: str) -> bool:
    return selector.startswith(_TAG) or not _WILDCARDS.isdisjoint(selector)


def _matches(selector: str, registry: Registry, bundles: Bundles, inside: tuple[str, ...]) -> Iterable[str]:
    if _is_search(selector):
        return (_tagged if selector.startswith(_TAG) else _matching)(selector, registry)
    if "." in selector:
        return [selector]
    if selector in inside:
        cycle = (*inside[inside.index(selector) :], selector)
        raise CycleError(f"a bundle is in itself: {' contains '.join(cycle)}; remove one of them", cycle=cycle)
    members, path = bundles.get(selector).members, (*inside, selector)
    return [patch_id for member in members for patch_id in _matches(member, registry, bundles, path)]


def _tagged(selector: str, registry: Registry) -> list[str]:
    tag = selector.removeprefix(_TAG)
    tags = {patch_id: registry.get(patch_id).tags for patch_id in registry.ids()}
    found = [patch_id for patch_id in tags if tag in tags[patch_id]]
    if not found:
        known = ", ".join(sorted({other for those in tags.values() for other in those})) or "none"
        raise UnknownPatchError(f"no patch has the tag {tag!r}; tags: {known}", patch_id=selector)
    return found


def _matching(selector: str, registry: Registry) -> list[str]:
    import fnmatch

    known = registry.ids()
    found = fnmatch.filter(known, selector)
    if not found:
        raise UnknownPatchError(f"no id matches {selector!r}; known: {', '.join(known) or 'none'}", patch_id=selector)
    return found


def _describe(point: EntryPoint) -> str:
    owner = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed distribution"
    return f"{owner} ({point.value})"


def _duplicate(patch_id: str, first: str, second: str) -> DuplicatePatchError:
    return DuplicatePatchError(
        f"the id {patch_id!r} is claimed twice, by {first} and by {second}; rename one of them",
        patch_id=patch_id,
        claimants=(first, second),
    )
