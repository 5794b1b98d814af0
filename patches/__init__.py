"""Reversible patches for libraries that you cannot change: declared, checked, scoped, audited, undone
exactly.

    import patches

    @patches.register("mylib.fast-norm", target="mylib.layers:Norm.forward", reason="the stock one is
    quadratic") def fast_norm(wrapped, instance, args, kwargs):
        return wrapped(*args, **kwargs)

    with patches.transaction("mylib.fast-norm", reason="training") as tx:
        ...                # active here; undone when the block ends, unless tx.commit()
    print(patches.audit())
"""

from __future__ import annotations

from .audit import Audit, Row, audit
from .errors import (
    ApplyError,
    ConflictError,
    CycleError,
    DefinitionError,
    DuplicatePatchError,
    IncompatibleError,
    NotActiveError,
    OverwrittenError,
    PatchError,
    ProbeError,
    ScopeError,
    TargetError,
    TransactionError,
    UndoError,
    UnknownPatchError,
    VerifyError,
    WrapperError,
)
from .ledger import LEDGER, Entry, Ledger, Receipt, State
from .patch import Patch
from .plan import verdict
from .registry import REGISTRY
from .scope import Scoped, on
from .transaction import Savepoint, Transaction, transaction
from .undo import active, revert
from .verdict import Verdict, VerdictKind

__all__ = [
    "LEDGER",
    "ApplyError",
    "Audit",
    "ConflictError",
    "CycleError",
    "DefinitionError",
    "DuplicatePatchError",
    "Entry",
    "IncompatibleError",
    "Ledger",
    "NotActiveError",
    "OverwrittenError",
    "Patch",
    "PatchError",
    "ProbeError",
    "Receipt",
    "Row",
    "Savepoint",
    "ScopeError",
    "Scoped",
    "State",
    "TargetError",
    "Transaction",
    "TransactionError",
    "UndoError",
    "UnknownPatchError",
    "Verdict",
    "VerdictKind",
    "VerifyError",
    "WrapperError",
    "active",
    "audit",
    "get",
    "ids",
    "on",
    "register",
    "revert",
    "transaction",
    "verdict",
]

register = REGISTRY.register
get = REGISTRY.get
ids = REGISTRY.ids
