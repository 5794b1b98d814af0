"""Transactions: plan, check, apply, verify; then the block; then undo, or keep what was committed."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, NoReturn, Self

from .activation import ACTIVATIONS
from .arrival import postpone, split
from .errors import ApplyError, TransactionError, VerifyError
from .ledger import LEDGER, Receipt, State, caller
from .patch import Patch
from .plan import Item, Step, make_plan
from .undo import report, undo_past_interrupts
from .verdict import Verdict, VerdictKind

__all__ = ["Savepoint", "Transaction", "transaction"]


_NOT_IMPORTED: Final = Verdict(kind=VerdictKind.UNKNOWN, why="its module is not imported yet")


class _Phase(enum.StrEnum):
    NEW = "not begun"
    OPEN = "open"
    FAILED = "failed"
    CLOSED = "closed"


class Transaction:
    """Patches that are applied together, and undone together unless they are committed.

    Used in a `with` statement, once. Entering applies all items or none; leaving, in whatever way, undoes all
    that was not committed. After a failure every operation raises TransactionError, except rolling back.

    Undoing in a transaction leaves nothing half done: newest first, past every failure. What could not be
    undone is raised as an UndoError, or, where the block itself raised, added to that exception as a note.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        reason: str,
        by: str,
        on: Sequence[object] | None,
        force: bool,
        count_calls: bool = False,
        deferred: bool = False,
    ) -> None:
        self.reason = reason
        self.by = by
        self.receipts: list[Receipt] = []
        """Everything that was applied, in order; `receipt.state` tells what has become of it."""
        self.skipped: list[Receipt] = []
        """What was not applied because it is obsolete; `receipt.verdict.why` tells the grounds."""
        self.deferred: list[Receipt] = []
        """What was to wait for its module; `receipt.state` tells whether it still does."""
        self.verdicts: dict[str, Verdict] = {}
        """id -> verdict, of everything that was planned."""
        self._items: tuple[Item, ...] = tuple(items)
        self._on = on
        self._force = force
        self._count_calls = count_calls
        self._deferred = deferred
        self._phase = _Phase.NEW
        self._cause: BaseException | None = None
        self._pending: list[Receipt] = []
        self._savepoints: list[Savepoint] = []

    def __enter__(self) -> Self:
        self._expect(_Phase.NEW)
        self._phase = _Phase.OPEN
        items, on = self._items, self._on
        # The transaction may outlive the block, in a variable; the instances must not have to.
        self._items, self._on = (), None
        try:
            self.apply(*items, on=on)
            return self  # noqa: TRY300 - an interrupt here must undo as well
        except BaseException as error:
            # `apply` has undone its own; this is for an interrupt after it, since nobody calls __exit__ now.
            report(self._undo(self._pending, "interrupted"), error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems = self._undo(self._pending, "" if error is None else f"the block raised {error!r}")
        self._phase = _Phase.CLOSED if error is None else _Phase.FAILED
        self._cause = error
        report(problems, error)

    def apply(self, *items: Item, on: Iterable[object] | None = None) -> list[Receipt]:
        """Apply more in this transaction, all or nothing; returns the receipts of what was applied.

        Where it raises, these items are undone and the transaction has failed: leave it, or roll back to a
        savepoint.
        """
        self._expect(_Phase.OPEN)
        made: list[Receipt] = []
        try:
            instances = None if on is None else tuple(on)
            now, later = split(items, instances) if self._deferred else (items, ())
            plan = make_plan(now, on=instances, force=self._force)
            self._install(plan.steps, made)
            ACTIVATIONS.drop_stale_graphs()
            _verify(made)
            self._record_skipped(plan.skipped)
            self._postpone(later, made)
            return made  # noqa: TRY300 - as in __enter__
        except BaseException as error:
            self._phase, self._cause = _Phase.FAILED, error
            report(self._undo(made, f"applying raised {error!r}"), error)
            raise

    def savepoint(self) -> Savepoint:
        """Mark this point: what is applied after it can be undone alone."""
        self._expect(_Phase.OPEN)
        savepoint = Savepoint(self, self._pending[-1].serial if self._pending else 0)
        self._savepoints.append(savepoint)
        return savepoint

    def commit(self) -> None:
        """Keep what is applied so far, beyond the block; `patches.revert` undoes it."""
        self._expect(_Phase.OPEN)
        self._pending.clear()

    def rollback(self) -> None:
        """Undo now what is not committed, and close the transaction."""
        if self._phase not in (_Phase.OPEN, _Phase.FAILED):
            self._expect(_Phase.OPEN)
        self._phase = _Phase.CLOSED
        report(self._undo(self._pending, "rolled back"), None)

    def _install(self, steps: Sequence[Step], made: list[Receipt]) -> None:
        with ACTIVATIONS.lock:
            ACTIVATIONS.catch_up()
            places = ACTIVATIONS.check([step.patch for step in steps])
            for step, place in zip(steps, places, strict=True):
                receipt = self._open(step)
                # Noted before anything is changed: an interrupt between the two leaves nothing unknown.
                made.append(receipt)
                self._pending.append(receipt)
                self.receipts.append(receipt)
                try:
                    ACTIVATIONS.apply(receipt, place)
                except Exception as error:  # noqa: BLE001 - foreign `__setattr__`
                    _raise_from(ApplyError, "could not be applied", made, receipt, error)

    def _postpone(self, later: Iterable[Patch], made: list[Receipt]) -> None:
        for patch in later:
            receipt = self._open(Step(patch=patch, scope=None, verdict=_NOT_IMPORTED))
            made.append(receipt)
            self._pending.append(receipt)
            self.deferred.append(receipt)
            postpone(receipt, force=self._force)

    def _record_skipped(self, steps: Sequence[Step]) -> None:
        with ACTIVATIONS.lock:
            for step in steps:
                receipt = self._open(step)
                LEDGER.record(receipt, State.SKIPPED, step.verdict.why)
                self.skipped.append(receipt)

    def _open(self, step: Step) -> Receipt:
        self.verdicts[step.patch.id] = step.verdict
        return LEDGER.open(
            step.patch,
            scope=step.scope,
            reason=self.reason,
            by=self.by,
            verdict=step.verdict,
            count_calls=self._count_calls,
        )

    def _undo(self, receipts: Iterable[Receipt], note: str) -> list[BaseException]:
        undone = list(receipts)
        problems = undo_past_interrupts(undone, note)
        self._pending = [receipt for receipt in self._pending if receipt not in undone]
        return problems

    def _rollback_to(self, savepoint: Savepoint) -> None:
        if savepoint not in self._savepoints:
            raise TransactionError(
                "this savepoint is gone: an earlier one was rolled back to, or the transaction has ended",
                state=self._phase.value,
            )
        if self._phase not in (_Phase.OPEN, _Phase.FAILED):
            self._expect(_Phase.OPEN)
        del self._savepoints[self._savepoints.index(savepoint) + 1 :]
        self._phase, self._cause = _Phase.OPEN, None
        after = [receipt for receipt in self._pending if receipt.serial > savepoint.serial]
        report(self._undo(after, "rolled back to a savepoint"), None)

    def _expect(self, phase: _Phase) -> None:
        if self._phase != phase:
            message = f"expected a transaction that is {phase}, and this one is {self._phase}"
            if self._cause is not None:
                message += f": {self._cause!r}"
            raise TransactionError(message, state=self._phase.value) from self._cause


class Savepoint:
    """A point in a transaction. A `with` statement of it rolls back to it where the block raises."""

    def __init__(self, owner: Transaction, serial: int) -> None:
        self.serial = serial
        self._owner = owner

    def rollback(self) -> None:
        """Undo what was applied since, unless committed; a transaction that failed since is open again.

        Can be done repeatedly. Savepoints made later are gone then; using them raises TransactionError.
        """
        self._owner._rollback_to(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.rollback()


def transaction(
    *items: Item,
    reason: str,
    on: Iterable[object] | None = None,
    force: bool = False,
    count_calls: bool = False,
    deferred: bool = False,
) -> Transaction:
    """Apply patches for the length of a `with` block, or beyond it if committed.

    An item is an id, a Patch, or `patches.on(either, instances)`; `on` limits every other item to these
    instances. Obsolete patches are skipped and listed in `.skipped`, unless `force`. Independent of any
    transaction around it: what is committed inside stays when the outer one is undone. With `count_calls`,
    `receipt.calls` and the audit tell how many calls went through each patch; uncounted calls cost nothing.

    With `deferred`, nothing is imported: a patch whose module is not there yet waits, and is applied when somebody
    imports that; one that then fails is `failed` in the audit. Leaving the block cancels what still waits.
    """
    if not reason.strip():
        raise TransactionError("expected a reason for the ledger, got an empty one", state=_Phase.NEW.value)
    instances = None if on is None else tuple(on)
    return Transaction(
        items, reason=reason, by=caller(), on=instances, force=force, count_calls=count_calls, deferred=deferred
    )


def _verify(receipts: Sequence[Receipt]) -> None:
    for receipt in receipts:
        if receipt.patch.verify is None:
            continue
        try:
            receipt.patch.verify()
        except Exception as error:  # noqa: BLE001 - the patch's own code
            _raise_from(VerifyError, "was applied and does not have its effect", receipts, receipt, error)


def _raise_from(
    kind: type[ApplyError], what: str, made: Sequence[Receipt], failed: Receipt, error: Exception
) -> NoReturn:
    undone = [receipt.id for receipt in made]
    message = f"{failed.id!r} {what}: {error}; undone: {', '.join(undone)}"
    raise kind(message, patch_id=failed.id, undone=undone) from error
