"""`defer`: patches for modules that are not imported yet, beyond any block."""

from __future__ import annotations

from collections.abc import Sequence

from .ledger import Receipt, State
from .plan import Item
from .transaction import transaction
from .undo import revert

__all__ = ["Deferred", "defer"]


class Deferred:
    """What `defer` has taken on."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.receipts = tuple(receipts)
        """One for each patch, whether applied already or not; `receipt.state` tells what has become of it."""

    @property
    def pending(self) -> list[Receipt]:
        """What still waits for its module."""
        return [receipt for receipt in self.receipts if receipt.state == State.PENDING]

    def cancel(self) -> list[Receipt]:
        """Wait no longer; returns the receipts that did. What was applied stays, until `patches.revert`."""
        return revert(*self.pending)


def defer(*items: Item, reason: str, force: bool = False) -> Deferred:
    """Apply patches as soon as their modules are imported, by whomever; at once where they are. Imports none.

    A patch without a probe is applied as soon as its module has been executed, and so before the rest of the package
    can copy the original; a patch with a probe when its whole package has been, which the probe may need. It waits
    for what it `needs` as well. A patch that fails then is `failed` in the ledger and in the audit, with the error,
    and a DeferredPatchWarning is given; the import goes on. Raises at once what can be told without importing.
    """
    with transaction(*items, reason=reason, force=force, deferred=True) as applied:
        applied.commit()
    return Deferred([*applied.receipts, *applied.deferred])
