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

from typing import Any, Final

from .audit import aliases, audit
from .deferred import defer
from .errors import PatchError, UndoError
from .foreign import changed_files, foreign
from .forms import passed
from .ledger import Receipt, State
from .manifest import active_set, digest, manifest, replay, replay_from_environment
from .patch import Patch, on
from .plan import fingerprint_of, plan, verdict
from .registry import BUNDLES, REGISTRY, select
from .target import MISSING, at
from .transaction import Transaction, transaction
from .undo import active, disable, enable, keep, reapply, revert, revert_all

__all__ = [
    "MISSING", "Patch", "PatchError", "Receipt", "State", "Transaction", "UndoError", "active", "active_set",
    "aliases", "at", "audit", "bundle", "changed_files", "defer", "digest", "disable", "enable", "fingerprint_of",
    "foreign", "get", "ids", "keep", "manifest", "on", "passed", "plan", "reapply", "register", "replay",
    "replay_from_environment", "revert", "revert_all", "select", "transaction", "verdict",
]  # fmt: skip

register = REGISTRY.register
get = REGISTRY.get
ids = REGISTRY.ids
bundle = BUNDLES.register

#: Modules whose other public names are attributes of this package too, imported when they are used.
_MORE: Final = (
    "errors", "ledger", "audit", "plan", "patch", "registry", "target", "transaction", "deferred", "journal",
    "manifest", "foreign.compare", "foreign.disk",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    for module in _MORE:
        found = importlib.import_module(f"{__name__}.{module}")
        if name in found.__all__:
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
