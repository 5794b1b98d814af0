"""Transactions: plan, check, apply, verify; run the block; then undo everything that was not committed."""

from __future__ import annotations

import enum
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar, cast

from .activation import ACTIVATIONS
from .deferred import split
from .errors import ApplyError, TransactionError, VerifyError
from .ledger import LEDGER, Receipt, State
from .patch import Patch, caller, chosen
from .plan import Item, Step, Verdict, VerdictKind, make_plan, refuse_to_split, resolve
from .target import STORED, Place
from .undo import report, undo_past_interrupts

__all__ = ["Savepoint", "Transaction", "transaction"]

_F = TypeVar("_F", bound=Callable[..., Any])
_NOT_IMPORTED: Final = Verdict(kind=VerdictKind.UNKNOWN, why="its module is not imported yet")


class _Phase(enum.StrEnum):
    NEW = "not begun"
    OPEN = "open"
    FAILED = "failed"
    CLOSED = "closed"


class Transaction:
    """Patches that are applied together, and undone together unless they are committed.

    Used in a `with` statement, once, or as a decorator, which begins a new one for each call. Entering applies all
    items or none; leaving, in any way, undoes all that was not committed, and so does dropping an open transaction.
    After a failure every operation raises TransactionError, except rolling back.

    Undoing is never left half done: it goes newest first, and continues past failures. Failures to undo are
    raised as an UndoError, or, if the block itself raised, added to its exception as notes.
    """

    def __init__(self, items: Sequence[Item], *, reason: str, by: str, on: Any, **options: bool) -> None:
        self.reason = reason
        self.by = by
        self.receipts: list[Receipt] = []
        """Receipts of all applied patches, in order; `receipt.state` is their current state."""
        self.skipped: list[Receipt] = []
        """Receipts of patches skipped because they are obsolete; `receipt.verdict.why` gives the reason."""
        self.deferred: list[Receipt] = []
        """Receipts of deferred patches; `receipt.state` tells whether they are still pending."""
        self.verdicts: dict[str, Verdict] = {}
        """id -> verdict, for every planned patch."""
        self._items: tuple[Item, ...] = tuple(items)
        self._on = on
        self._options = options
        self._phase = _Phase.NEW
        self._cause: BaseException | None = None
        self._pending: list[Receipt] = []
        # An interrupt between two bytecodes of the `with` statement, or of the methods here, ends in this. Not in
        # `__del__`, which would also run, and swallow an interrupt, for every transaction that is closed.
        self._dropped = weakref.finalize(self, undo_past_interrupts, self._pending, "transaction dropped while open")
        self._dropped.atexit = False
        self._savepoints: list[Savepoint] = []

    def __call__(self, function: _F) -> _F:
        """Decorate a function, a coroutine function or a generator function: the patches are active while it runs."""
        self._expect(_Phase.NEW)
        if isinstance(function, type) or not callable(function):
            raise TransactionError(f"expected a function to decorate, got {function!r}", state=self._phase.value)
        items, reason, by, on, options = self._items, self.reason, self.by, self._on, self._options
        return cast("_F", _decorated(function, lambda: Transaction(items, reason=reason, by=by, on=on, **options)))

    def __enter__(self) -> Self:
        try:
            self._expect(_Phase.NEW)
            self._phase = _Phase.OPEN
            items, on = self._items, self._on
            # The transaction may outlive the block, in a variable, but must not keep the instances alive.
            self._items, self._on = (), None
            self.apply(*items, on=on)
            return self  # noqa: TRY300 - an interrupt here must undo as well
        except BaseException as error:
            # `apply` has undone its own changes; this handles an interrupt after it, since __exit__ will not be called.
            problems = self._undo(self._pending, "interrupted")
            self._dropped.detach()
            report(problems, error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems = self._undo(self._pending, "" if error is None else f"the block raised {error!r}")
        self._phase = _Phase.CLOSED if error is None else _Phase.FAILED
        self._remember(error)
        self._dropped.detach()
        report(problems, error)

    def apply(self, *items: Item, on: Iterable[object] | Callable[[Any], bool] | None = None) -> list[Receipt]:
        """Apply more patches in this transaction, all or none; returns their receipts.

        If this raises, these items are undone and the transaction has failed: leave it, or roll back to a
        savepoint.
        """
        self._expect(_Phase.OPEN)
        made: list[Receipt] = []
        try:
            instances = chosen(on)
            force = self._options["force"]
            now, later = split(items, instances) if self._options["deferred"] else (items, {})
            plan = make_plan(now, on=instances, force=force)
            refuse_to_split(items, [] if force else [step.patch for step in plan.skipped])
            self._install(plan.steps, made)
            ACTIVATIONS.drop_stale_graphs()
            _verify(made)
            self._record_skipped(plan.skipped)
            self._postpone(later, made)
            return made  # noqa: TRY300 - as in __enter__
        except BaseException as error:
            self._phase = _Phase.FAILED
            self._remember(error)
            report(self._undo(made, f"applying raised {error!r}"), error)
            raise

    def savepoint(self) -> Savepoint:
        """Mark this point: patches applied after it can be undone without the others."""
        self._expect(_Phase.OPEN)
        savepoint = Savepoint(self, self._pending[-1].serial if self._pending else 0)
        self._savepoints.append(savepoint)
        return savepoint

    def commit(self) -> None:
        """Keep the patches applied so far beyond the block; `patches.revert` undoes them."""
        self._expect(_Phase.OPEN)
        self._pending.clear()

    def rollback(self) -> None:
        """Undo everything that is not committed now, and close the transaction."""
        self._expect(_Phase.OPEN, _Phase.FAILED)
        self._phase = _Phase.CLOSED
        report(self._undo(self._pending, "rolled back"), None)

    def _install(self, steps: Sequence[Step], made: list[Receipt]) -> None:
        with ACTIVATIONS.lock:
            ACTIVATIONS.catch_up()
            places = ACTIVATIONS.check([step.patch for step in steps], resolve)
            changed: list[Place] = []
            for step, checked in zip(steps, places, strict=True):
                # What was replaced by an earlier patch may be on the way to this one's target.
                place = resolve(step.patch) if changed else checked
                changed += [place] if place.kind in STORED else []
                # Recorded before anything is changed, so that an interrupt in between leaves no untracked change.
                receipt = self._open(step, made, self._pending, self.receipts)
                try:
                    ACTIVATIONS.apply(receipt, place)
                except Exception as error:  # noqa: BLE001 - foreign `__setattr__`
                    _raise_from(ApplyError, "could not be applied", made, receipt, error)

    def _postpone(self, later: Mapping[Patch, str], made: list[Receipt]) -> None:
        for patch, bundle in later.items():
            step = Step(patch=patch, scope=None, verdict=_NOT_IMPORTED)
            receipt = self._open(step, made, self._pending, self.deferred)
            ACTIVATIONS.pending.postpone(receipt, force=self._options["force"], bundle=bundle)
        ACTIVATIONS.pending.notice()  # imported after the check and before the finder was installed

    def _record_skipped(self, steps: Sequence[Step]) -> None:
        with ACTIVATIONS.lock:
            for step in steps:
                LEDGER.record(self._open(step, self.skipped), State.SKIPPED, step.verdict.why)

    def _open(self, step: Step, *kept: list[Receipt]) -> Receipt:
        self.verdicts[step.patch.id] = step.verdict
        given = {"reason": self.reason, "by": self.by, "count_calls": self._options["count_calls"]}
        receipt = LEDGER.open(step.patch, scope=step.scope, verdict=step.verdict, **given)
        for receipts in kept:
            receipts.append(receipt)
        return receipt

    def _undo(self, receipts: Iterable[Receipt], note: str) -> list[BaseException]:
        undone = list(receipts)
        problems = undo_past_interrupts(undone, note)
        self._pending[:] = [receipt for receipt in self._pending if receipt not in undone]
        return problems

    def _rollback_to(self, savepoint: Savepoint) -> None:
        if savepoint not in self._savepoints:
            raise TransactionError(
                "this savepoint is gone: an earlier one was rolled back to, or the transaction has ended",
                state=self._phase.value,
            )
        self._expect(_Phase.OPEN, _Phase.FAILED)
        del self._savepoints[self._savepoints.index(savepoint) + 1 :]
        self._phase, self._cause = _Phase.OPEN, None
        after = [receipt for receipt in self._pending if receipt.serial > savepoint.serial]
        report(self._undo(after, "rolled back to a savepoint"), None)

    def _remember(self, error: BaseException | None) -> None:
        # Not an interrupt: in a cycle with its traceback, the transaction would be dropped late.
        self._cause = error if isinstance(error, Exception) else None

    def _expect(self, *phases: _Phase) -> None:
        if self._phase not in phases:
            why = "" if self._cause is None else f": {self._cause!r}"
            message = f"expected a transaction that is {phases[0]}, and this one is {self._phase}{why}"
            raise TransactionError(message, state=self._phase.value) from self._cause


class Savepoint:
    """A point in a transaction. As a `with` statement, it is rolled back to if the block raises."""

    def __init__(self, owner: Transaction, serial: int) -> None:
        self.serial = serial
        self._owner = owner

    def rollback(self) -> None:
        """Undo everything applied since, unless committed; a transaction that failed since is open again.

        Can be called repeatedly. Later savepoints become invalid; using them raises TransactionError.
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
    reason: str = "",
    on: Iterable[object] | Callable[[Any], bool] | None = None,
    force: bool = False,
    count_calls: bool = False,
    deferred: bool = False,
) -> Transaction:
    """Apply patches for the duration of a `with` block or of a decorated function, or beyond it if committed.

    An item is an id, a Patch, or `patches.on(either, instances)`; `on` limits every other item to these
    instances. `reason` is for the ledger; by default each patch's own. Obsolete patches are skipped and listed in
    `.skipped`, unless `force`. Independent of any enclosing transaction: patches committed inside stay when the outer
    one is undone. With `count_calls`, or PATCHES_COUNT=1 in the environment, `receipt.calls` and the audit show the
    number of calls through each patch; uncounted calls cost nothing.

    With `deferred`, nothing is imported: a patch whose module is not imported yet waits, and is applied when somebody
    imports it; one that then fails is `failed` in the audit. Leaving the block cancels patches that still wait.
    """
    if reason and not reason.strip():
        raise TransactionError("expected a reason for the ledger, got a blank one", state=_Phase.NEW.value)
    return Transaction(
        items, reason=reason, by=caller(), on=chosen(on), force=force, count_calls=count_calls, deferred=deferred
    )


def _decorated(function: Callable[..., Any], begin: Callable[[], Transaction]) -> Callable[..., Any]:
    """The function with a transaction around each call, or around each run of a coroutine or generator."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with begin():
            return function(*args, **kwargs)

    def run_generator(*args: Any, **kwargs: Any) -> Any:
        with begin():
            return (yield from function(*args, **kwargs))

    async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
        with begin():
            return await function(*args, **kwargs)

    async def run_async_generator(*args: Any, **kwargs: Any) -> Any:
        with begin():
            inner = function(*args, **kwargs)
            step = inner.asend(None)
            while True:  # `async for` would pass on nothing that is sent or thrown
                try:
                    item = await step
                except StopAsyncIteration:
                    return
                try:
                    step = inner.asend((yield item))
                except BaseException as thrown:  # noqa: BLE001 - any error
                    step = inner.athrow(thrown)

    forms = {
        inspect.isgeneratorfunction: run_generator,
        inspect.iscoroutinefunction: run_coroutine,
        inspect.isasyncgenfunction: run_async_generator,
    }
    return functools.wraps(function)(next((form for is_one, form in forms.items() if is_one(function)), run))


def _verify(receipts: Sequence[Receipt]) -> None:
    for receipt in receipts:
        try:
            if receipt.patch.verify is not None:
                receipt.patch.verify()
        except Exception as error:  # noqa: BLE001 - the patch's own code
            _raise_from(VerifyError, "was applied and does not have its effect", receipts, receipt, error)


def _raise_from(
    kind: type[ApplyError], what: str, made: Sequence[Receipt], failed: Receipt, error: Exception
) -> NoReturn:
    undone = tuple(receipt.id for receipt in made)
    message = f"{failed.id!r} {what}: {error} ({type(error).__name__}); undone: {', '.join(undone)}"
    raise kind(message, patch_id=failed.id, undone=undone) from error
