"""Aliases: copies of a target, made by `from x import f` and the like, which a patch does not reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .activation import ACTIVATIONS
from .errors import TargetError
from .patch import Patch
from .plan import resolve
from .registry import REGISTRY

__all__ = ["Alias", "aliases", "unpatched_copies"]


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Another binding of a target, as it is now."""

    where: str
    """`module:name`, `module:Class.name`, `module:TABLE['key']` or `module:LIST[0]`."""
    holds: Literal["original", "patched"]
    """"original": calls through it are not patched, where patches are active. "patched": it was rewritten, or copied
    while a patch was active.
    """


def aliases(patch: str | Patch) -> list[Alias]:
    """Every copy of a patch's target, or of a target, found by identity in the modules that are loaded.

    Looks into every module, and into the classes, dictionaries and lists stored in one; imports the target's module
    and nothing else. Copies in closures, partials, default arguments and instances are not found, nor are those of
    classmethods, properties and values. Raises UnknownPatchError, TargetError.
    """
    target, kind = _target(patch)
    resolve(target, kind)
    with ACTIVATIONS.lock:
        copies = ACTIVATIONS.copies(target, kind)
        found = [
            *(Alias(where=str(binding), holds="original") for binding in copies.of_original()),
            *(Alias(where=str(binding), holds="patched") for binding in copies.of_installed()),
        ]
    return sorted(found, key=lambda alias: alias.where)


def unpatched_copies(patch: Patch) -> tuple[str, ...]:
    """The copies through which calls bypass an active patch; empty if the patch ignores aliases."""
    if patch.aliases == "ignore":
        return ()
    spared = frozenset({patch.module})
    return tuple(sorted(map(str, ACTIVATIONS.copies(patch.target, patch.kind).of_original(spared))))


def _target(patch: str | Patch) -> tuple[str, str]:
    if isinstance(patch, str) and ":" in patch:
        return patch, _kind_of(patch)
    declared = REGISTRY.get(patch) if isinstance(patch, str) else patch
    return declared.target, declared.kind


def _kind_of(target: str) -> str:
    """The kind to look a target up by: "auto", or "class" for a class, which "auto" refuses to patch."""
    try:
        resolve(target, "auto")
    except TargetError:
        resolve(target, "class")
        return "class"
    return "auto"
