"""Activations: every slot in use, and which receipts hold it. Nothing else changes slots or the ledger."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from .errors import OverwrittenError, TargetError
from .ledger import LEDGER, Ledger, Receipt, State
from .order import in_order, refuse_conflicts
from .patch import Patch
from .slot import Slot
from .target import Place, describe, locate

__all__ = ["ACTIVATIONS", "Activations"]


class Activations:
    """What is active in this process.

    `lock` is to be held around every call. It is re-entrant, since a finalizer may revert patches in the
    middle of anything, and it is used as it is: a context manager written in Python could be interrupted
    between acquiring it and saying so.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.lock = threading.RLock()
        self._slots: dict[tuple[int, str], Slot] = {}
        self._held: dict[Receipt, Slot] = {}
        # Undone, except that a foreign object was in the way of restoring the place.
        self._left_behind: dict[Receipt, Slot] = {}
        # Whose last instance is gone, while somebody, perhaps this very thread, was changing something.
        self._expired: deque[Receipt] = deque()
        self._changing = False

    def catch_up(self) -> None:
        """Undo what has no instance left, and finish earlier undoing where nothing is in the way any more."""
        while self._expired:
            self._expire(self._expired.popleft())
        for receipt, slot in list(self._left_behind.items()):
            if slot.settle():
                self.ledger.record(receipt, State.REVERTED, "once nothing was in the way")
                del self._left_behind[receipt]

    def active(self) -> list[Receipt]:
        """The receipts that are applied, oldest first."""
        return list(self._held)

    def left_behind(self) -> list[Receipt]:
        """The receipts that were undone but could not be taken away, oldest first."""
        return list(self._left_behind)

    def condition(self, receipt: Receipt) -> State:
        """What is live at the place of a receipt that is active; for any other, what the ledger says."""
        slot = self._held.get(receipt)
        return receipt.state if slot is None else slot.condition

    def place(self, target: str, kind: str) -> Place:
        """Resolve a target to its place as it was before any patch of ours. Raises TargetError."""
        owner, name = locate(target)
        slot = self._slots.get((id(owner), name))
        if slot is None or not slot.links:
            return describe(target, owner, name, kind)
        if kind not in ("auto", slot.place.kind):
            why = f"its kind is {slot.place.kind.value!r}, and the patch says {kind!r}"
            raise TargetError(f"cannot patch {target!r}: {why}", target=target, why=why)
        return slot.place

    def check(self, patches: Sequence[Patch]) -> list[Place]:
        """The places of these patches, if all can be applied to what is live. Changes nothing."""
        together = [*(receipt.patch for receipt in self._held), *patches]
        refuse_conflicts(together)
        in_order(together)
        places = [self.place(patch.target, patch.kind) for patch in patches]
        for place in places:
            if place.key in self._slots:
                self._slots[place.key].refuse_overwritten()
        return places

    def apply(self, receipt: Receipt, place: Place) -> None:
        """Install the receipt's patch at its place. What fails half way is taken back by `undo`."""
        slot = self._slots.get(place.key)
        if slot is None or not slot.links:
            slot = self._slots[place.key] = Slot(place)
        self._held[receipt] = slot
        self._changing = True
        try:
            slot.add(receipt)
            self.ledger.record(receipt, State.ACTIVE)
        finally:
            self._changing = False
        if receipt.scope is not None:
            receipt.scope.when_empty(lambda: self._expire_soon(receipt))

    def undo(self, receipt: Receipt, note: str = "") -> None:
        """Take back what a receipt changed; one that is undone already is no error.

        Raises OverwrittenError where somebody else has changed the place since; the receipt counts as undone.
        """
        slot = self._held.get(receipt) or self._left_behind.get(receipt)
        if slot is None:
            return
        self._changing = True
        try:
            slot.remove(receipt)
        except OverwrittenError as error:
            self.ledger.record(receipt, State(error.state), str(error))
            self._left_behind[receipt] = slot
            self._forget_unused(slot)
            self._held.pop(receipt, None)
            raise
        finally:
            self._changing = False
        self.ledger.record(receipt, State.REVERTED, note)
        self._forget_unused(slot)
        self._left_behind.pop(receipt, None)
        self._held.pop(receipt, None)

    def undo_all(self, receipts: Iterable[Receipt], note: str = "") -> list[Exception]:
        """Undo the receipts, newest first, past every failure; returns the failures.

        An interrupt comes through; doing it all again then completes it.
        """
        errors: list[Exception] = []
        for receipt in sorted(receipts, key=lambda receipt: receipt.serial, reverse=True):
            try:
                self.undo(receipt, note)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other receipts come next
                errors.append(error)
        return errors

    def _forget_unused(self, slot: Slot) -> None:
        if not slot.links and self._slots.get(slot.place.key) is slot:
            del self._slots[slot.place.key]

    def _expire_soon(self, receipt: Receipt) -> None:
        # The callback of a weak reference. It runs in the middle of anything: a change that this very thread is
        # making, for which the lock is no obstacle, or another thread's, for which waiting could be a deadlock.
        self._expired.append(receipt)
        if not self.lock.acquire(blocking=False):
            return
        try:
            if not self._changing:
                self.catch_up()
        finally:
            self.lock.release()

    def _expire(self, receipt: Receipt) -> None:
        try:
            self.undo(receipt, "every instance is gone")
        except OverwrittenError:
            # Nobody called, so nobody could handle it: the ledger has it, and the audit shows it.
            return


ACTIVATIONS: Final = Activations(LEDGER)
