"""`defer`: patches for modules that are not imported yet, not tied to a `with` block."""

from __future__ import annotations

from collections.abc import Sequence

from .ledger import Receipt, State
from .plan import Item
from .transaction import transaction
from .undo import revert

__all__ = ["Deferred", "defer"]


class Deferred:
    """The patches of one call of `defer`."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.receipts = tuple(receipts)
        """One for each patch, applied or pending; `receipt.state` tells which."""

    @property
    def pending(self) -> list[Receipt]:
        """The receipts that still wait for their modules."""
        return [receipt for receipt in self.receipts if receipt.state == State.PENDING]

    def cancel(self) -> list[Receipt]:
        """Cancel the pending receipts, and return them. Applied patches stay until `patches.revert`."""
        return revert(*self.pending)


def defer(*items: Item, reason: str, force: bool = False) -> Deferred:
    """Apply patches as soon as anyone imports their modules, or at once if imported already. Imports none.

    A patch without a probe is applied as soon as its module has been executed, before the rest of the package can copy
    the original. A patch with a probe is applied after its whole package has been executed, since the probe may use
    all of it. Patches that it `needs` are waited for as well. A patch that then fails is `failed` in the ledger and in
    the audit, with the error, and a DeferredPatchWarning is issued; the import goes on. Errors that can be found
    without importing are raised at once.
    """
    with transaction(*items, reason=reason, force=force, deferred=True) as applied:
        applied.commit()
    return Deferred([*applied.receipts, *applied.deferred])
