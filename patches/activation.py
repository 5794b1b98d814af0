"""Activations: every slot in use, and the receipts that hold it. Nothing else changes slots or the ledger."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Final

from .copies import Copies
from .deferred import Pending
from .errors import OverwrittenError
from .forms import is_traced
from .ledger import LEDGER, Ledger, Receipt, State
from .patch import Patch
from .registry import BUNDLES, REGISTRY
from .slot import Slot, in_order, refuse_conflicts
from .target import STORED, Kind, Place, Target, accept, describe, locate, refuse, rehearse

__all__ = ["ACTIVATIONS", "Activations", "when_compiled"]


class Activations:
    """The patches that are active in this process.

    Callers hold `lock` around every call. It is re-entrant, since a finalizer may revert patches at any
    moment. It is a plain RLock: a context manager written in Python could be interrupted after acquiring
    the lock and before recording that.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.lock = threading.RLock()
        self._slots: dict[tuple[int, str], Slot] = {}
        self._held: dict[Receipt, Slot] = {}
        # Receipts that were undone, but whose place could not be restored because a foreign object is there.
        self._left_behind: dict[Receipt, Slot] = {}
        # Receipts whose last instance was collected while a change was in progress, perhaps in this very thread.
        self._expired: deque[Receipt] = deque()
        self._changing = False
        self.pending = Pending(self)
        """Receipts that wait for their modules."""
        self.failed: list[Receipt] = []
        """Receipts that could not be applied when their modules were imported, oldest first."""
        self._stale = False

    def catch_up(self) -> None:
        """Undo receipts that have no instance left, and finish earlier undos that a foreign object was blocking."""
        while self._expired:
            self._expire(self._expired.popleft())
        for receipt, slot in list(self._left_behind.items()):
            if slot.settle():
                self._close(receipt, "once nothing was in the way")

    def _close(self, receipt: Receipt, note: str) -> None:
        self.ledger.record(receipt, State.REVERTED, note)
        del self._left_behind[receipt]

    def is_quiet(self, packages: Iterable[str]) -> bool:
        """Whether no patch of these top-level packages is active."""
        with self.lock:
            patched = {target.module.partition(".")[0] for receipt in self._held for target in receipt.patch.targets}
            return patched.isdisjoint(packages)

    def active(self) -> list[Receipt]:
        """The receipts that are applied, oldest first."""
        return list(self._held)

    def in_force(self) -> list[Receipt]:
        """The receipts that are applied, and those that wait for their modules, oldest first."""
        return sorted([*self._held, *self.pending.receipts()], key=lambda receipt: receipt.serial)

    def known(self) -> list[Receipt]:
        """Every receipt that can be undone now: those in force, left behind, or failed."""
        with self.lock:
            self.catch_up()
            return [*self.in_force(), *self._left_behind, *self.failed]

    def installed(self) -> list[object]:
        """The objects that we installed and that are still in place, one for each intact slot."""
        return [slot.live for slot in self._slots.values() if slot.links and self._condition(slot) == State.ACTIVE]

    def condition(self, receipt: Receipt) -> State:
        """The current state of a receipt: of an active one, as found at its place; of any other, from the ledger."""
        slot = self._held.get(receipt)
        if slot is None:
            return receipt.state
        found = self._condition(slot)
        return State.DISABLED if found == State.ACTIVE and receipt.disabled else found

    def _condition(self, slot: Slot) -> State:
        ours = [other.live for other in self._slots.values() if other.links and other.place.kind in STORED]
        return slot.condition(lambda owner: any(owner is value for value in ours))

    def _slot(self, target: Target) -> tuple[Slot | None, object]:
        """The slot in use at a target, if there is one, and the target's owner."""
        owner = locate(target)
        slot = self._slots.get((id(owner), target.name))
        return (None if slot is None or not slot.links else slot), owner

    def place(self, target: Target, kind: str) -> Place:
        """Resolve a target to its place as it was before any patch of ours. Raises TargetError."""
        slot, owner = self._slot(target)
        if slot is None:
            return describe(target, owner, kind)
        if kind == Kind.ADD:
            ids = ", ".join(link.patch.id for link in slot.links)
            raise refuse(target, f"it is there already, since {ids} was applied")
        accept(target, slot.place, kind)
        return slot.place

    def copies(self, target: Target, kind: str) -> Copies:
        """The copies of the target's object. Raises TargetError."""
        slot, _ = self._slot(target)
        return Copies(self.place(target, kind)) if slot is None else slot.copies

    def check(self, patches: Sequence[Patch], resolve: Callable[[Patch], Place]) -> list[Place]:
        """Check that all these patches can be applied now; returns their places. Changes nothing."""
        together = [*(receipt.patch for receipt in self._held), *patches]
        refuse_conflicts(together)
        in_order(together)
        places = [resolve(patch) for patch in patches]
        for place in places:
            if place.key in self._slots:
                self._slots[place.key].refuse_overwritten()
            else:
                rehearse(place)
        return places

    def apply(self, receipt: Receipt, place: Place) -> None:
        """Install the receipt's patch at its place. If this fails halfway, `undo` restores the place."""
        slot = self._slots.get(place.key)
        if slot is None or not slot.links:
            slot = self._slots[place.key] = Slot(place)
        receipt.target = str(place.target)
        self._held[receipt] = slot
        self._changing = True
        try:
            slot.add(receipt)
            self._stale = self._stale or is_traced(slot.place)
            self.ledger.record(receipt, State.ACTIVE)
        finally:
            self._changing = False
        if receipt.scope is not None:
            receipt.scope.when_empty(lambda: self._expire_soon(receipt))

    def fail(self, receipt: Receipt, note: str) -> None:
        """Undo anything that a pending receipt may have changed, and record that it failed."""
        self.pending.take(receipt)
        self.undo_all([receipt], note)
        self.ledger.record(receipt, State.FAILED, note)
        self.failed.append(receipt)

    def held_with(self, receipt: Receipt) -> list[Receipt]:
        """The receipts at the same place, oldest first; empty if the receipt is not active."""
        slot = self._held.get(receipt)
        return [other for other, held in self._held.items() if held is slot] if slot is not None else []

    def reapply(self, receipts: Sequence[Receipt]) -> None:
        """Move the receipts of one place from the definition before a reload to the one after it.

        Changes nothing if the new definitions cannot be patched. Raises TargetError, OverwrittenError.
        """
        targets = [self._held[receipt].place.target for receipt in receipts]
        kinds = [receipt.patch.kind for receipt in receipts]
        places = [describe(target, locate(target), kind) for target, kind in zip(targets, kinds, strict=True)]
        for place in places:
            rehearse(place)
        for receipt in receipts:
            self.undo(receipt, "to be applied again after a reload")
        for receipt, place in zip(receipts, places, strict=True):
            self.apply(receipt, place)

    def switch(self, receipt: Receipt, *, disabled: bool) -> None:
        """Disable or enable an active receipt; nothing is undone.

        Raises OverwrittenError if somebody else has replaced a value.
        """
        if receipt.disabled is disabled or receipt not in self._held:
            return
        receipt.disabled = disabled
        self._changing = True
        try:
            self._held[receipt].refresh()
            self._stale = self._stale or is_traced(self._held[receipt].place)
        finally:
            self._changing = False
        self.ledger.record(receipt, State.DISABLED if disabled else State.ACTIVE)

    def undo(self, receipt: Receipt, note: str = "") -> None:
        """Undo a receipt's change; a receipt that is already undone is no error.

        Raises OverwrittenError if somebody else has changed the place since; the receipt still counts as undone.
        """
        slot = self._held.get(receipt) or self._left_behind.get(receipt)
        if slot is None:
            self._undo_unapplied(receipt, note)
            return
        if receipt in self._left_behind and slot.is_over():
            self._close(receipt, note)
            return
        self._changing = True
        self._stale = self._stale or is_traced(slot.place)
        try:
            slot.remove(receipt)
        except OverwrittenError as error:
            if not slot.links:
                slot.let_go()
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
        """Undo the receipts, newest first, continuing past failures; returns the failures.

        An interrupt propagates; calling this again with the same receipts completes the undo.
        """
        errors: list[Exception] = []
        for receipt in sorted(receipts, key=lambda receipt: receipt.serial, reverse=True):
            try:
                self.undo(receipt, note)
            except Exception as error:  # noqa: BLE001 - any error; the other receipts come next
                errors.append(error)
        return errors

    def _undo_unapplied(self, receipt: Receipt, note: str) -> None:
        if self.pending.take(receipt):
            self.ledger.record(receipt, State.REVERTED, note or "cancelled before its module was imported")
        if receipt in self.failed:
            self.failed.remove(receipt)
            self.ledger.record(receipt, State.REVERTED, note)

    def _forget_unused(self, slot: Slot) -> None:
        if not slot.links and self._slots.get(slot.place.key) is slot:
            del self._slots[slot.place.key]

    def drop_stale_graphs(self) -> None:
        """Make torch.compile trace anew, if a traced target has changed. To be called without the lock, for which a
        thread that is compiling may be waiting.

        Drops all graphs, because no public API tells which ones have inlined a function; but only compiled code, not
        the counters, CUDA graphs and settings that `torch.compiler.reset` also resets. Nothing is imported.
        """
        if self._stale:
            when_compiled(self._drop_graphs)

    def _drop_graphs(self) -> None:
        self._stale = False
        dynamo = sys.modules.get("torch._dynamo")
        # While another thread is still importing it, nothing has been compiled either.
        drop = getattr(dynamo, "reset_code_caches", None) or getattr(dynamo, "reset", None)
        if drop is not None:
            drop()

    def try_locked(self, work: Callable[[], object], *, timeout: float) -> bool:
        """Do the work with the lock, if it can be had within `timeout` seconds; returns whether it was."""
        lock: Any = self.lock
        if lock._is_owned():
            work()
            return True
        # An interrupt may come after the call that takes the lock, and before anything can be made of its result.
        try:
            if not lock.acquire(timeout=timeout):
                return False
            work()
            return True
        finally:
            if lock._is_owned():
                lock.release()

    def renew_locks(self) -> None:
        """Replace the locks that other threads held at a `fork`: in the child, they are never released."""
        # A lock of the forking thread itself is kept, since that thread goes on here and will release it.
        if self.lock.acquire(blocking=False):
            self.lock.release()
        else:
            self.lock, self._changing = threading.RLock(), False
        REGISTRY.lock, BUNDLES.lock = threading.Lock(), threading.Lock()

    def _expire_soon(self, receipt: Receipt) -> None:
        # The callback of a weak reference, which runs at any moment: during a change made by this very thread, which
        # the lock does not stop, or by another thread, where waiting could deadlock.
        self._expired.append(receipt)
        if not _compiles(threading.get_ident()):
            self.try_locked(lambda: None if self._changing else self.catch_up(), timeout=0)

    def _expire(self, receipt: Receipt) -> None:
        stale = self._stale
        try:
            self.undo(receipt, "every instance is gone")
        except OverwrittenError:
            # There is no caller to handle an error: it is recorded in the ledger and shown by the audit.
            return
        finally:
            self._stale = stale  # no graph took other instances through the patch


def _compiles(thread: int) -> bool:
    """Whether torch.compile is at work in the thread of that identifier."""
    stack = traceback.walk_stack(sys._current_frames().get(thread))
    return any(frame.f_globals.get("__name__") == "torch._dynamo.convert_frame" for frame, _ in stack)


def when_compiled(work: Callable[[], object]) -> None:
    """Do the work: now, or in a thread of its own once this one, in which something is collected, has compiled.

    Graphs that are dropped while one is compiled crash the process, for its place is freed before it is filled; and
    patches that are undone meanwhile fail the guards of what has been traced already.
    """
    if _compiles(threading.get_ident()):
        threading.Thread(target=_do_later, args=(work,), name="patches-later", daemon=True).start()
    else:
        work()


def _do_later(work: Callable[[], object]) -> None:
    lock = getattr(sys.modules["torch._dynamo.convert_frame"], "compile_lock", nullcontext())
    while True:
        with lock:
            if not any(_compiles(thread) for thread in list(sys._current_frames())):
                work()
                return
        time.sleep(0.01)


def _finish_imports() -> None:
    """Wait for another thread to import what this package imports on use: in the child it never would be."""
    for name in {"importlib.metadata", "packaging.specifiers", "json", "socket", "wrapt"} & sys.modules.keys():
        importlib.import_module(name)


ACTIVATIONS: Final = Activations(LEDGER)
os.register_at_fork(before=_finish_imports, after_in_child=ACTIVATIONS.renew_locks)
