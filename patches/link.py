"""Links: one patch at one slot, with the receipts that keep it active there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from .counting import CallCounter
from .ledger import Receipt
from .patch import Patch

__all__ = ["Link"]


class Link:
    """One patch in the chain of a slot, active while at least one receipt holds it.

    However many receipts there are, the wrapper runs once per call, and only if one of them covers the subject;
    a receipt without a scope covers everything. Composed objects consult the link on each call, so a link without
    receipts lets calls through, even in copies of the patched object that were never restored.
    """

    __slots__ = ("_made", "_receipts", "counter", "everyone", "patch", "scopes")

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self._receipts: tuple[Receipt, ...] = ()
        self._made: tuple[object, object] | None = None
        self.counter: CallCounter | None = None
        """The call counter, if a receipt has requested one."""
        self.everyone = False
        """Whether some receipt covers every subject."""
        self.scopes: tuple[Mapping[int, object], ...] = ()
        """Covered objects of each receipt with a scope, by `id`."""

    def __bool__(self) -> bool:
        return bool(self._receipts)

    def value_over(self, inner: object) -> object:
        """The wrapper's result for a value, computed once, so that a class it makes stays the same class."""
        if self._made is None or self._made[0] is not inner:
            self._made = inner, self.patch.wrapper(lambda: inner, None, (), {})
        return self._made[1]

    def covers(self, subject: object) -> bool:
        """Whether a call on `subject` goes through the wrapper."""
        if self.everyone:
            return True
        key = id(subject)
        for ids in self.scopes:  # noqa: SIM110 - `any` with a generator takes four times as long, on every call
            if key in ids:
                return True
        return False

    def hold(self, receipt: Receipt) -> None:
        """Add a receipt that keeps the link active."""
        if receipt.count_calls and self.counter is None:
            self.counter = CallCounter()
        if receipt.count_calls:
            receipt.counter, receipt.calls_before = self.counter, cast("CallCounter", self.counter).calls
        self._set((*self._receipts, receipt))

    def drop(self, receipt: Receipt) -> bool:
        """Remove a receipt; returns False if it does not hold the link."""
        held = receipt in self._receipts
        self._set(tuple(other for other in self._receipts if other is not receipt))
        return held

    def refresh(self) -> None:
        """Update the scopes after receipts were disabled or enabled."""
        self._set(self._receipts)

    def _set(self, receipts: tuple[Receipt, ...]) -> None:
        # New tuples, never changed in place: other threads may be iterating over the old ones. The receipts are set
        # last, so that dropping a receipt again completes a drop that was interrupted.
        enabled = [receipt for receipt in receipts if not receipt.disabled]
        self.scopes = tuple(receipt.scope.ids for receipt in enabled if receipt.scope is not None)
        self.everyone = any(receipt.scope is None for receipt in enabled)
        self._receipts = receipts
