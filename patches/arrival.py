"""Deferred application: a patch is applied as soon as its module is imported."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any, Final

from .activation import ACTIVATIONS
from .errors import ApplyError, DeferredPatchWarning, PatchError, ScopeError
from .ledger import LEDGER, Receipt, State
from .patch import Patch, Scoped
from .plan import Item, acceptable, expand, is_left_out, resolve
from .slot import in_order, refuse_conflicts
from .verdict import Verdict

__all__ = ["postpone", "split"]

_PATIENCE: Final = 60.0
"""Seconds to wait for other threads. Without a limit, a thread that waits for our import would deadlock with us."""


def split(items: Iterable[Item], on: Any) -> tuple[list[Item], list[Patch]]:
    """Divide items into those to apply now and the patches to defer, in the order of application; imports no target.

    Raises ScopeError for a deferred patch that is limited to instances, since those need the module imported.
    """
    now: list[Item] = []
    later: dict[str, Patch] = {}
    for patch, instances in expand(items, on):
        if not _missing(patch):
            now.append(patch if instances is None else Scoped(patch=patch, instances=instances))
        elif instances is not None:
            raise ScopeError(
                f"{patch.id!r} cannot be limited to instances yet: {patch.targets[0].module!r} is not imported",
                patch_id=patch.id,
            )
        else:
            later[patch.id] = patch
    return now, [later[patch_id] for patch_id in in_order(later.values())]


def postpone(receipt: Receipt, *, force: bool) -> None:
    """Defer the receipt until its patch's missing modules are imported, or apply it if they are by now.

    It is applied in the thread that imports the last of them. An error then neither fails the import nor keeps other
    patches from being applied: the ledger and the audit say `failed` and why, and DeferredPatchWarning is issued.
    """

    def apply(ready: Receipt) -> None:
        _apply_or_fail(ready, force=force)

    with ACTIVATIONS.lock:
        refuse_conflicts([*(other.patch for other in ACTIVATIONS.in_force()), receipt.patch])
        missing = _missing(receipt.patch)
        ACTIVATIONS.pend(receipt, missing, apply)
    # Imported after the check and before the hook was installed.
    if not _missing(receipt.patch) and receipt in ACTIVATIONS.pending:
        apply(receipt)


def _missing(patch: Patch) -> frozenset[str]:
    """The modules that must be imported before the patch can be applied.

    A probe runs the library, so a patch with a probe waits for the whole package. A patch without one waits for the
    module alone, so that the rest of the package already imports the patched object.
    """
    waited: set[str] = set()
    for needed, _ in expand([patch]):
        module = needed.targets[0].module
        waited.add(module)
        if needed.probe is not None:
            waited.add(module.partition(".")[0])
    return frozenset(waited - sys.modules.keys())


def _apply_or_fail(receipt: Receipt, *, force: bool) -> None:
    try:
        found = acceptable(receipt.patch, force=force)
        _refuse_failed_needs(receipt.patch)
        _apply(receipt, found, force=force)
    except Exception as error:  # noqa: BLE001 - it must not fail somebody else's import
        _fail(receipt, error)
    except BaseException as interrupt:
        _fail(receipt, interrupt)
        raise


def _apply(receipt: Receipt, found: Verdict, *, force: bool) -> None:
    _acquire(receipt)
    try:
        if not ACTIVATIONS.pending.take(receipt):
            return  # cancelled meanwhile
        receipt.verdict = found
        if is_left_out(receipt.patch, found) and not force:
            LEDGER.record(receipt, State.SKIPPED, found.why)
            return
        (place,) = ACTIVATIONS.check([receipt.patch], resolve)
        ACTIVATIONS.apply(receipt, place)
    finally:
        ACTIVATIONS.lock.release()
    ACTIVATIONS.drop_stale_graphs()
    if receipt.patch.verify is not None:
        receipt.patch.verify()


def _fail(receipt: Receipt, error: BaseException) -> None:
    if ACTIVATIONS.lock.acquire(timeout=_PATIENCE):
        try:
            ACTIVATIONS.fail(receipt, repr(error))
        finally:
            ACTIVATIONS.lock.release()
    try:
        message = f"{receipt.id!r}, applied at {receipt.by} for when its module is imported, failed: {error!r}"
        warnings.warn(message, DeferredPatchWarning, stacklevel=2)
    except DeferredPatchWarning:
        return  # warnings are errors here, but the import must not fail; the ledger has the error


def _acquire(receipt: Receipt) -> None:
    if not ACTIVATIONS.lock.acquire(timeout=_PATIENCE):
        raise ApplyError(
            f"{receipt.id!r} was not applied: another thread has been changing patches for {_PATIENCE:.0f} s",
            patch_id=receipt.id,
        )


def _refuse_failed_needs(patch: Patch) -> None:
    failed = {receipt.id for receipt in ACTIVATIONS.failed()} & set(patch.needs)
    if failed - {receipt.id for receipt in ACTIVATIONS.active()}:
        raise PatchError(f"{patch.id!r} was not applied: it needs {', '.join(sorted(failed))}, which failed")
