"""Reapplying patches to the new definitions after a reload of their module."""

from __future__ import annotations

from .activation import ACTIVATIONS
from .errors import NotActiveError, OverwrittenError, ScopeError, VerifyError
from .ledger import Receipt, State
from .plan import acceptable
from .undo import report, undo_past_interrupts

__all__ = ["reapply"]


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
        chosen = _chosen(patch)
    for receipt in chosen:
        acceptable(receipt.patch, force=True)
    with ACTIVATIONS.lock:
        moved = _move(chosen)
    ACTIVATIONS.drop_stale_graphs()
    for receipt in moved:
        _verify(receipt)
    return moved


def _chosen(patch: str | Receipt) -> list[Receipt]:
    active = ACTIVATIONS.active()
    chosen = [receipt for receipt in active if receipt is patch or receipt.id == patch]
    if not chosen:
        patch_id = patch if isinstance(patch, str) else patch.id
        raise NotActiveError(f"{patch_id!r} is not active, so that there is nothing to apply again", patch_id=patch_id)
    found = [receipt for receipt in chosen if ACTIVATIONS.condition(receipt) == State.RELOADED]
    for receipt in chosen:
        _refuse(receipt)
    return found


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
    in_class = "." in receipt.target.partition(":")[2]
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


def _verify(receipt: Receipt) -> None:
    if receipt.patch.verify is None:
        return
    try:
        receipt.patch.verify()
    except Exception as error:
        report(undo_past_interrupts([receipt], f"after a reload, verifying raised {error!r}"), error)
        message = f"{receipt.id!r} does not have its effect after the reload: {error}; it was undone"
        raise VerifyError(message, patch_id=receipt.id, undone=[receipt.id]) from error
