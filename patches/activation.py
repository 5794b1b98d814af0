"""Activations: every slot in use, and which receipts hold it. Nothing else changes slots or the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from .errors import OverwrittenError, TargetError
from .ledger import LEDGER, Ledger, Receipt, State
from .lock import OperationLock
from .order import in_order, refuse_conflicts
from .patch import Patch
from .slot import Slot
from .target import Place, describe, locate

__all__ = ["ACTIVATIONS", "Activations"]


class Activations:
    """What is active in this process. `operation()` is the lock, to be held around every other call."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._lock = OperationLock()
        self._slots: dict[tuple[int, str], Slot] = {}
        self._held: dict[Receipt, Slot] = {}
        # Undone, except that a foreign object was in the way of restoring the place.
        self._left_behind: dict[Receipt, Slot] = {}

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Hold the lock. First finish what an earlier undo could not, if nothing is in the way any more."""
        with self._lock.operation():
            self._settle()
            yield

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
        slot.add(receipt)
        self.ledger.record(receipt, State.ACTIVE)
        if receipt.scope is not None:
            receipt.scope.when_empty(lambda: self._lock.defer(lambda: self._expire(receipt)))

    def undo(self, receipt: Receipt, note: str = "") -> None:
        """Take back what a receipt changed; one that is undone already is no error.

        Raises OverwrittenError where somebody else has changed the place since; the receipt counts as undone.
        """
        slot = self._held.get(receipt) or self._left_behind.get(receipt)
        if slot is None:
            return
        try:
            slot.remove(receipt)
        except OverwrittenError as error:
            self.ledger.record(receipt, State(error.state), str(error))
            self._left_behind[receipt] = slot
            self._forget_unused(slot)
            self._held.pop(receipt, None)
            raise
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

    def _settle(self) -> None:
        for receipt, slot in list(self._left_behind.items()):
            if slot.settle():
                self.ledger.record(receipt, State.REVERTED, "once nothing was in the way")
                del self._left_behind[receipt]

    def _forget_unused(self, slot: Slot) -> None:
        if not slot.links and self._slots.get(slot.place.key) is slot:
            del self._slots[slot.place.key]

    def _expire(self, receipt: Receipt) -> None:
        try:
            self.undo(receipt, "every instance is gone")
        except OverwrittenError:
            # Nobody called, so nobody could handle it: the ledger has it, and the audit shows it.
            return


ACTIVATIONS: Final = Activations(LEDGER)
