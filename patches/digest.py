"""The active set: the patches of this process, in a form that can be compared between processes."""

from __future__ import annotations

from .ledger import Receipt
from .patch import Patch
from .undo import active
from .versions import installed_version, owner_of

__all__ = ["active_set", "digest", "process_wide", "versions_of"]


def active_set() -> tuple[str, ...]:
    """List each patch that acts on the whole process as one line: id, target, versions. Sorted, without duplicates.

    Patches that are limited to instances are left out: they end when the instances are garbage-collected, which
    happens at different times even in equal processes.
    """
    return tuple(sorted({_line(receipt.patch) for receipt in process_wide() if not receipt.disabled}))


def digest() -> str:
    """Hash the active set to hexadecimal digits, equal in processes with the same patches.

    The order of application does not matter. Ids and targets do, and the versions of patches and patched libraries.
    """
    from hashlib import sha256

    return sha256("\n".join(active_set()).encode()).hexdigest()


def process_wide() -> list[Receipt]:
    """The active receipts without a scope, oldest first."""
    return [receipt for receipt in active() if receipt.scope is None]


def versions_of(patch: Patch) -> dict[str, str]:
    """Distribution -> installed version, of the patch's own distribution, of its target, and of its requirements."""
    owners = (owner_of(module) for module in (patch.module, patch.targets[0].module))
    versions = dict(owner.split(" ", 1) for owner in owners if " " in owner)
    versions.update({name: installed_version(name) or "not installed" for name in patch.requires})
    return dict(sorted(versions.items()))


def _line(patch: Patch) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(patch).items())
    return f"{patch.id} {patch.target} [{versions}]"
