"""Links: one patch at one slot, with everything that keeps it active there."""

from __future__ import annotations

from collections.abc import Mapping

from .ledger import Receipt
from .patch import Patch

__all__ = ["Link"]


class Link:
    """One patch in the chain of a slot, for as long as at least one receipt holds it.

    However many receipts there are, the wrapper runs once a call, and only where one of them covers the
    subject: a receipt without a scope covers everything. Objects composed from a link look here on each call,
    so a link that nobody holds any more lets calls through, even in copies of the patched object that were
    never taken back.
    """

    __slots__ = ("_receipts", "everyone", "patch", "scopes")

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self._receipts: tuple[Receipt, ...] = ()
        self.everyone = False
        """Some receipt covers every subject."""
        self.scopes: tuple[Mapping[int, object], ...] = ()
        """Of the receipts with a scope: `id(object)` of what each covers."""

    def __bool__(self) -> bool:
        return bool(self._receipts)

    def covers(self, subject: object) -> bool:
        """Whether a call that is about `subject` goes through the wrapper."""
        if self.everyone:
            return True
        key = id(subject)
        for ids in self.scopes:  # noqa: SIM110 - `any` with a generator takes four times as long, on every call
            if key in ids:
                return True
        return False

    def hold(self, receipt: Receipt) -> None:
        """Be active for this receipt as well."""
        self._set((*self._receipts, receipt))

    def drop(self, receipt: Receipt) -> bool:
        """Forget the receipt; False where it does not hold the link."""
        held = receipt in self._receipts
        self._set(tuple(other for other in self._receipts if other is not receipt))
        return held

    def _set(self, receipts: tuple[Receipt, ...]) -> None:
        # New tuples, never changed in place: other threads are iterating over the old ones. The receipts come
        # last, so that dropping one once more completes what an interrupt has cut short.
        self.scopes = tuple(receipt.scope.ids for receipt in receipts if receipt.scope is not None)
        self.everyone = any(receipt.scope is None for receipt in receipts)
        self._receipts = receipts
