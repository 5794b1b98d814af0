"""Undoing, disabling, enabling and reapplying active patches, and reporting failures to undo."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from .activation import ACTIVATIONS, when_compiled
from .errors import NotActiveError, OverwrittenError, ScopeError, UndoError, VerifyError
from .ledger import Receipt, State
from .patch import caller
from .plan import acceptable
from .registry import is_pattern, select

__all__ = ["active", "disable", "enable", "keep", "reapply", "report", "revert", "revert_all", "undo_past_interrupts"]

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
        chosen = list({receipt: None for patch in patches for receipt in _chosen(patch)})
    report(undo_past_interrupts(chosen, f"reverted at {caller()}"), None)
    return chosen


def revert_all() -> list[Receipt]:
    """Undo every patch of this process, whatever has applied it; returns the receipts that were undone.

    Also cancels patches that wait for their modules. Raises UndoError as `revert` does.
    """
    chosen = ACTIVATIONS.known()
    report(undo_past_interrupts(chosen, f"reverted at {caller()}"), None)
    return chosen


def keep(receipts: Iterable[Receipt], owner: object) -> Callable[[], object]:
    """Revert the receipts when `owner` is garbage-collected; the returned function does so at once, and only once.

    For patches that are committed, and serve one object: a model, a connection. Not at the end of the process.
    """
    kept = tuple(receipts)
    try:
        finalizer = weakref.finalize(owner, when_compiled, partial(revert, *kept))
    except TypeError as error:
        why = f"an object of type {type(owner).__name__!r} cannot be referenced weakly"
        raise ScopeError(f"no patch can be kept for it: {why}", patch_id="") from error
    finalizer.atexit = False
    return finalizer


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
    known = ACTIVATIONS.known()
    if isinstance(patch, Receipt):
        return [patch] if patch in known else []
    wanted = set(select(patch)) if is_pattern(patch) else {patch}
    chosen = [receipt for receipt in known if receipt.id in wanted]
    if not chosen:
        what = f"nothing of {patch!r} is" if is_pattern(patch) else f"{patch!r} is not"
        active = ", ".join(sorted({receipt.id for receipt in known})) or "none"
        raise NotActiveError(f"{what} active; active: {active}", patch_id=patch)
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


def reapply(patch: str | Receipt) -> list[Receipt]:
    """Apply a patch, by id or receipt, again after its module was reloaded; returns the receipts concerned.

    All receipts of the same places move together and stay valid, so their owners can still undo them. Objects
    made before the reload keep the stock behaviour. Patches that are still in place are left alone.

    Raises NotActiveError; OverwrittenError if somebody else has patched over it since; ScopeError for a patch of a
    class that is limited to instances, since those belong to the class before the reload; IncompatibleError,
    ProbeError and the like if the patch does not fit the new definitions; and VerifyError, after undoing.
    """
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        chosen = [receipt for receipt in ACTIVATIONS.active() if receipt is patch or receipt.id == patch]
        reloaded = [receipt for receipt in chosen if ACTIVATIONS.condition(receipt) == State.RELOADED]
        for receipt in chosen:
            _refuse(receipt)
    if not chosen:
        patch_id = patch if isinstance(patch, str) else patch.id
        raise NotActiveError(f"{patch_id!r} is not active, so that there is nothing to apply again", patch_id=patch_id)
    for receipt in reloaded:
        acceptable(receipt.patch, force=True)
    with ACTIVATIONS.lock:
        moved = _move(reloaded)
    ACTIVATIONS.drop_stale_graphs()
    for receipt in moved:
        _verify_again(receipt)
    return moved


def _refuse(receipt: Receipt) -> None:
    condition = ACTIVATIONS.condition(receipt)
    if condition in (State.BURIED, State.OVERWRITTEN):
        raise OverwrittenError(
            f"{receipt.id!r} is {condition}: somebody else has changed {receipt.target!r} since; "
            "revert it, then apply it again",
            target=receipt.target,
            state=condition.value,
            found=None,
        )
    in_class = len(receipt.patch.targets[0].path) > 1
    if condition == State.RELOADED and receipt.scope is not None and in_class:
        raise ScopeError(
            f"{receipt.id!r} is limited to {receipt.scope_text} of a class from before the reload, where it still "
            "acts; apply it to instances of the new class",
            patch_id=receipt.id,
        )


def _move(chosen: list[Receipt]) -> list[Receipt]:
    moved: list[Receipt] = []
    for receipt in chosen:
        if receipt in moved:
            continue
        together = ACTIVATIONS.held_with(receipt)
        for other in together:
            _refuse(other)
        ACTIVATIONS.reapply(together)
        moved += together
    return moved


def _verify_again(receipt: Receipt) -> None:
    try:
        if receipt.patch.verify is not None:
            receipt.patch.verify()
    except Exception as error:
        report(undo_past_interrupts([receipt], f"after a reload, verifying raised {error!r}"), error)
        why = f"{error} ({type(error).__name__}); it was undone"
        message = f"{receipt.id!r} does not have its effect after the reload: {why}"
        raise VerifyError(message, patch_id=receipt.id, undone=(receipt.id,)) from error
