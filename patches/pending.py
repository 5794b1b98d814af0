"""Pending receipts, whose modules are not imported yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from .import_hook import ImportHook
from .ledger import Receipt

__all__ = ["Pending"]


class Pending:
    """Receipts, each with the modules that it waits for. Thread-safe; takes no other lock while holding its own."""

    def __init__(self) -> None:
        self._missing: dict[Receipt, frozenset[str]] = {}
        self._lock = threading.RLock()
        self._hook = ImportHook(self._executed)
        self._when_ready: Callable[[Receipt], None] | None = None

    def __contains__(self, receipt: Receipt) -> bool:
        return receipt in self._missing

    def renew_lock(self) -> None:
        """Replace the lock in a child made by `fork`."""
        self._lock = threading.RLock()

    def receipts(self) -> list[Receipt]:
        """The receipts that wait, oldest first."""
        return list(self._missing)

    def add(self, receipt: Receipt, modules: Iterable[str], when_ready: Callable[[Receipt], None]) -> None:
        """Call `when_ready(receipt)` once all `modules` have been executed, in the thread that imports the last one."""
        with self._lock:
            self._when_ready = when_ready
            self._missing[receipt] = frozenset(modules)
            self._watch()

    def take(self, receipt: Receipt) -> bool:
        """Remove a pending receipt; returns False if it was not pending any more."""
        with self._lock:
            waited = self._missing.pop(receipt, None) is not None
            if waited:
                self._watch()
            return waited

    def _executed(self, module: str) -> None:
        with self._lock:
            for receipt, missing in self._missing.items():
                self._missing[receipt] = missing - {module}
            ready = [receipt for receipt, missing in self._missing.items() if not missing]
            self._watch()
        for receipt in ready:
            if self._when_ready is not None:
                self._when_ready(receipt)

    def _watch(self) -> None:
        self._hook.watch(frozenset[str]().union(*self._missing.values()))
