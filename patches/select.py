"""Selection: resolve a user's selectors to patch ids."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Final

from .bundle import BUNDLES, Bundles
from .errors import CycleError, UnknownPatchError
from .registry import REGISTRY, Registry

__all__ = ["is_pattern", "select"]

_TAG: Final = "tag:"
_WILDCARDS: Final = frozenset("*?[")


def select(*selectors: str, registry: Registry = REGISTRY, bundles: Bundles = BUNDLES) -> list[str]:
    """Resolve selectors to ids, in the order of the selectors, without duplicates.

    A selector is an id; the name of a bundle; a glob over ids (`bitsandbytes.*`), which imports nothing; or
    `tag:word`, which imports every known patch to read its tags. The matches of one selector are sorted; those of a
    bundle keep its order. Raises UnknownPatchError if one matches nothing, CycleError if a bundle contains itself.
    """
    found = [patch_id for selector in selectors for patch_id in _matches(selector, registry, bundles, ())]
    return list(dict.fromkeys(found))


def is_pattern(selector: str) -> bool:
    """Whether the selector is not an id: a bundle, a glob, or a tag."""
    return "." not in selector or selector.startswith(_TAG) or not _WILDCARDS.isdisjoint(selector)


def _matches(selector: str, registry: Registry, bundles: Bundles, inside: tuple[str, ...]) -> Iterable[str]:
    if selector.startswith(_TAG):
        return _tagged(selector, registry)
    if not _WILDCARDS.isdisjoint(selector):
        return _matching(selector, registry)
    if "." in selector:
        return [selector]
    if selector in inside:
        cycle = (*inside[inside.index(selector) :], selector)
        raise CycleError(f"a bundle is in itself: {' contains '.join(cycle)}; remove one of them", cycle=cycle)
    members = bundles.get(selector).members
    path = (*inside, selector)
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
    known = registry.ids()
    found = fnmatch.filter(known, selector)
    if not found:
        raise UnknownPatchError(f"no id matches {selector!r}; known: {', '.join(known) or 'none'}", patch_id=selector)
    return found
