"""Undoing: what is active, taking it back, and saying what went wrong with that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from .activation import ACTIVATIONS
from .errors import NotActiveError, UndoError
from .ledger import Receipt, caller

__all__ = ["active", "report", "revert", "undo_past_interrupts"]

_PATIENCE: Final = 5
"""After so many interrupts while undoing, to get out matters more than to have undone everything."""


def active() -> list[Receipt]:
    """The receipts of every patch that is applied now, oldest first."""
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        return ACTIVATIONS.active()


def revert(*patches: str | Receipt) -> list[Receipt]:
    """Undo these, whichever transaction applied them, newest first; returns the receipts that were undone.

    An id means every receipt of that patch; NotActiveError where there is none. A receipt that is undone
    already is no error. Raises UndoError for what somebody else has changed since.
    """
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        chosen = list({receipt: None for patch in patches for receipt in _chosen(patch)})
    report(undo_past_interrupts(chosen, f"reverted at {caller()}"), None)
    return chosen


def _chosen(patch: str | Receipt) -> list[Receipt]:
    known = [*ACTIVATIONS.active(), *ACTIVATIONS.left_behind()]
    if isinstance(patch, Receipt):
        return [patch] if patch in known else []
    chosen = [receipt for receipt in known if receipt.id == patch]
    if not chosen:
        raise NotActiveError(f"{patch!r} is not active; active: {_ids(known)}", patch_id=patch)
    return chosen


def undo_past_interrupts(receipts: Sequence[Receipt], note: str) -> list[BaseException]:
    """Undo the receipts, even if the user presses Ctrl-C a few times meanwhile; returns what was raised."""
    interrupts: list[BaseException] = []
    while len(interrupts) < _PATIENCE:
        try:
            with ACTIVATIONS.lock:
                return [*interrupts, *ACTIVATIONS.undo_all(receipts, note)]
        except BaseException as interrupt:  # noqa: BLE001 - raised again by who called, once all is undone
            interrupts.append(interrupt)
    return interrupts


def report(problems: Sequence[BaseException], error: BaseException | None) -> None:
    """Raise what went wrong while undoing, or note it on the error that is already on its way."""
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
