"""Undoing, disabling and enabling active patches, and reporting failures to undo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from .activation import ACTIVATIONS
from .errors import NotActiveError, UndoError
from .ledger import Receipt, caller
from .select import is_pattern, select

__all__ = ["active", "disable", "enable", "report", "revert", "undo_past_interrupts"]

_PATIENCE: Final = 5
"""Number of interrupts while undoing, after which leaving takes priority over completing the undo."""


def active() -> list[Receipt]:
    """The receipts of all active patches, oldest first."""
    ACTIVATIONS.pending.notice()
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        return ACTIVATIONS.active()


def revert(*patches: str | Receipt) -> list[Receipt]:
    """Undo patches, whichever transaction applied them, newest first; returns the receipts that were undone.

    An id means every receipt of that patch; raises NotActiveError if there is none. A receipt that is undone
    already is no error. Raises UndoError for places that somebody else has changed since.
    """
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        chosen = list({receipt: None for patch in patches for receipt in _chosen(patch)})
    report(undo_past_interrupts(chosen, f"reverted at {caller()}"), None)
    return chosen


def disable(*patches: str | Receipt) -> list[Receipt]:
    """Suspend the effect of patches without undoing them, until `enable`; returns the receipts that changed.

    They still count for order and conflicts, and the audit shows them as disabled. If another receipt of the
    same patch covers a call, the patch still acts. Raises the same errors as `revert`.
    """
    return _switch(patches, disabled=True)


def enable(*patches: str | Receipt) -> list[Receipt]:
    """Restore the effect of disabled receipts; returns the receipts that changed."""
    return _switch(patches, disabled=False)


def _switch(patches: Sequence[str | Receipt], *, disabled: bool) -> list[Receipt]:
    problems: list[BaseException] = []
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        held = {receipt: None for patch in patches for receipt in _chosen(patch)}
        chosen = [receipt for receipt in held if receipt.disabled is not disabled and not receipt.left_behind]
        for receipt in chosen:
            try:
                ACTIVATIONS.switch(receipt, disabled=disabled)
            except Exception as error:  # noqa: BLE001 - any error; the other receipts come next
                problems.append(error)
    ACTIVATIONS.drop_stale_graphs()
    report(problems, None)
    return chosen


def _chosen(patch: str | Receipt) -> list[Receipt]:
    known = [*ACTIVATIONS.in_force(), *ACTIVATIONS.left_behind(), *ACTIVATIONS.failed()]
    if isinstance(patch, Receipt):
        return [patch] if patch in known else []
    if is_pattern(patch):
        return _selected(patch, known)
    chosen = [receipt for receipt in known if receipt.id == patch]
    if not chosen:
        raise NotActiveError(f"{patch!r} is not active; active: {_ids(known)}", patch_id=patch)
    return chosen


def _selected(selector: str, known: Sequence[Receipt]) -> list[Receipt]:
    wanted = set(select(selector))
    chosen = [receipt for receipt in known if receipt.id in wanted]
    if not chosen:
        raise NotActiveError(f"nothing of {selector!r} is active; active: {_ids(known)}", patch_id=selector)
    return chosen


def undo_past_interrupts(receipts: Sequence[Receipt], note: str) -> list[BaseException]:
    """Undo the receipts, even if the user presses Ctrl-C a few times meanwhile; returns the exceptions."""
    interrupts: list[BaseException] = []
    while len(interrupts) < _PATIENCE:
        try:
            with ACTIVATIONS.lock:
                problems = ACTIVATIONS.undo_all(receipts, note)
            ACTIVATIONS.drop_stale_graphs()
            return [*interrupts, *problems]  # noqa: TRY300 - an interrupt here must not lose the problems
        except BaseException as interrupt:  # noqa: BLE001 - the caller raises it again once everything is undone
            interrupts.append(interrupt)
    return interrupts


def report(problems: Sequence[BaseException], error: BaseException | None) -> None:
    """Raise the problems of an undo, or add them as notes to `error` if it is already propagating."""
    if error is not None:
        for problem in problems:
            error.add_note(f"While undoing patches after this: {problem!r}")
        return
    for problem in problems:
        if not isinstance(problem, Exception):
            raise problem
    ordinary = [problem for problem in problems if isinstance(problem, Exception)]
    if ordinary:
        raise UndoError("some patches could not be undone", ordinary)


def _ids(receipts: Iterable[Receipt]) -> str:
    return ", ".join(sorted({receipt.id for receipt in receipts})) or "none"
