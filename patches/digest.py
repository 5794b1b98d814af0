"""The active set: what is patched in this process, in a form that two processes can compare."""

from __future__ import annotations

from .ledger import Receipt
from .patch import Patch
from .target import parse
from .undo import active
from .versions import installed_version, owner_of

__all__ = ["active_set", "digest", "process_wide", "versions_of"]


def active_set() -> tuple[str, ...]:
    """One line for each patch that acts on this whole process: id, target, versions. Sorted, each once.

    A patch that is limited to instances is not in it: it goes when the garbage collector takes them, which equal
    processes do at different times.
    """
    return tuple(sorted({_line(receipt.patch) for receipt in process_wide() if not receipt.disabled}))


def digest() -> str:
    """A hash of the active set, in hexadecimal digits: equal in two processes that have patched the same.

    The order of application does not matter; ids, targets and versions do, those of the patches and of what they patch.
    """
    from hashlib import sha256

    return sha256("\n".join(active_set()).encode()).hexdigest()


def process_wide() -> list[Receipt]:
    """The receipts of what is applied without a scope, oldest first."""
    return [receipt for receipt in active() if receipt.scope is None]


def versions_of(patch: Patch) -> dict[str, str]:
    """Distribution -> version: of what declares the patch, what it patches, and what it requires; as installed."""
    owners = (owner_of(module) for module in (patch.module, parse(patch.target).module))
    versions = dict(owner.split(" ", 1) for owner in owners if " " in owner)
    versions.update({name: installed_version(name) or "not installed" for name in patch.requires})
    return dict(sorted(versions.items()))


def _line(patch: Patch) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(patch).items())
    return f"{patch.id} {patch.target} [{versions}]"
