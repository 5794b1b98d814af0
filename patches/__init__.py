"""Reversible patches for libraries that you cannot change: declared, checked, scoped, audited, undone exactly.

A patch is data, and acts inside a transaction:

    import patches

    @patches.register("mylib.fast-norm", target="mylib.layers:Norm.forward", reason="the stock one is slow")
    def fast_norm(wrapped, instance, args, kwargs):
        return wrapped(*args, **kwargs)

    with patches.transaction("mylib.fast-norm", reason="training") as tx:
        ...                # active here; undone when the block ends, unless tx.commit()
    print(patches.audit())
"""

from __future__ import annotations

from .aliases import Alias, aliases
from .audit import Audit, Row, audit
from .bundle import BUNDLES, Bundle
from .deferred import Deferred, defer
from .errors import (
    ApplyError,
    ConflictError,
    CycleError,
    DeferredPatchWarning,
    DefinitionError,
    DriftError,
    DriftWarning,
    DuplicatePatchError,
    ForeignError,
    IncompatibleError,
    JournalError,
    ManifestError,
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
from .foreign import ChangedFile, Foreign, ForeignPatch, changed_files, foreign
from .journal import Difference, Process, Processes, read_journals
from .ledger import LEDGER, Entry, Ledger, Receipt, State
from .manifest import active_set, digest, manifest, replay, replay_from_environment
from .patch import Patch
from .plan import Plan, fingerprint_of, plan, verdict
from .reapply import reapply
from .registry import REGISTRY
from .scope import Scoped, on
from .select import select
from .transaction import Savepoint, Transaction, transaction
from .undo import active, disable, enable, revert
from .verdict import Verdict, VerdictKind

__all__ = [
    "LEDGER",
    "Alias",
    "ApplyError",
    "Audit",
    "Bundle",
    "ChangedFile",
    "ConflictError",
    "CycleError",
    "Deferred",
    "DeferredPatchWarning",
    "DefinitionError",
    "Difference",
    "DriftError",
    "DriftWarning",
    "DuplicatePatchError",
    "Entry",
    "Foreign",
    "ForeignError",
    "ForeignPatch",
    "IncompatibleError",
    "JournalError",
    "Ledger",
    "ManifestError",
    "NotActiveError",
    "OverwrittenError",
    "Patch",
    "PatchError",
    "Plan",
    "ProbeError",
    "Process",
    "Processes",
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
    "active_set",
    "aliases",
    "audit",
    "bundle",
    "changed_files",
    "defer",
    "digest",
    "disable",
    "enable",
    "fingerprint_of",
    "foreign",
    "get",
    "ids",
    "manifest",
    "on",
    "plan",
    "read_journals",
    "reapply",
    "register",
    "replay",
    "replay_from_environment",
    "revert",
    "select",
    "transaction",
    "verdict",
]

register = REGISTRY.register
get = REGISTRY.get
ids = REGISTRY.ids
bundle = BUNDLES.register
