"""The ledger: who applied which patch where, when and why, and its current state."""

from __future__ import annotations

import enum
import itertools
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from .counting import CallCounter
from .journal import Journal
from .patch import Patch
from .scope import Scope
from .verdict import Verdict
from .versions import owner_of

__all__ = ["LEDGER", "Entry", "Ledger", "Receipt", "State", "caller"]

_PACKAGE: Final = __name__.partition(".")[0]


class State(enum.StrEnum):
    """The state of one application of a patch."""

    ACTIVE = "active"
    DISABLED = "disabled"
    """Applied, but without effect until it is enabled."""
    BURIED = "buried"
    """Somebody else has wrapped our object."""
    OVERWRITTEN = "overwritten"
    """Somebody else has replaced our object."""
    RELOADED = "reloaded"
    """The module was executed again, and its new definition replaced ours."""
    PENDING = "pending"
    """Not applied yet: waiting for its module to be imported."""
    FAILED = "failed"
    """Not applied: applying it raised an error after its module was imported."""
    REVERTED = "reverted"
    SKIPPED = "skipped"
    """Never applied: obsolete."""


class Receipt:
    """One application of one patch. Compares by identity, and keeps no patched object alive."""

    __slots__ = (
        "__weakref__", "by", "calls_before", "count_calls", "counter", "disabled", "note", "patch", "pid", "reason",
        "scope", "serial", "since", "state", "verdict"
    )  # fmt: skip

    def __init__(
        self,
        *,
        serial: int,
        patch: Patch,
        scope: Scope | None,
        reason: str,
        by: str,
        verdict: Verdict,
        count_calls: bool = False,
    ) -> None:
        self.serial = serial
        self.patch = patch
        self.scope = scope
        self.reason = reason
        self.by = by
        self.verdict = verdict
        self.since = datetime.now(UTC)
        self.pid = os.getpid()
        self.state = State.SKIPPED
        """State by the ledger's latest entry, set by the ledger alone; `audit()` compares it with the live objects."""
        self.note = ""
        self.disabled = False
        """Whether it is applied but without effect until it is enabled again."""
        self.count_calls = count_calls
        self.counter: CallCounter | None = None
        self.calls_before = 0

    @property
    def calls(self) -> int | None:
        """Number of calls through the wrapper since this was applied; None if calls are not counted.

        If several receipts hold the same patch at the same place, each counts the calls of all.
        """
        return None if self.counter is None else self.counter.calls - self.calls_before

    @property
    def id(self) -> str:
        """The id of the patch."""
        return self.patch.id

    @property
    def target(self) -> str:
        """The target of the patch."""
        return self.patch.target

    @property
    def owner(self) -> str:
        """The distribution and version that declare the patch, or else its module."""
        return owner_of(self.patch.module)

    @property
    def scope_text(self) -> str:
        """`process`, or the number of living instances that it covers."""
        return "process" if self.scope is None else str(self.scope)

    @property
    def left_behind(self) -> bool:
        """Whether it is undone, but its object could not be removed because somebody else had replaced it."""
        return self.state in (State.BURIED, State.OVERWRITTEN, State.RELOADED)

    def __repr__(self) -> str:
        return f"<Receipt {self.serial}: {self.id} on {self.scope_text}, {self.state}>"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger: at `time`, the receipt with this `serial` entered `state`."""

    serial: int
    id: str
    target: str
    owner: str
    scope: str
    state: State
    reason: str
    by: str
    """`file:line` of the statement that applied it."""
    time: datetime
    pid: int
    verdict: str
    note: str


class Ledger:
    """Append-only list of entries. Writers hold the lock of the slots."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._receipts: list[Receipt] = []
        self._serials = itertools.count(1)
        self._journal = Journal(lambda: map(_line, self._entries.copy()))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry, oldest first."""
        return tuple(self._entries)

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Every receipt, oldest first."""
        return tuple(self._receipts)

    def open(
        self,
        patch: Patch,
        *,
        scope: Scope | None,
        reason: str,
        by: str,
        verdict: Verdict,
        count_calls: bool = False,
    ) -> Receipt:
        """Create a receipt, without recording anything yet."""
        receipt = Receipt(
            serial=next(self._serials),
            patch=patch,
            scope=scope,
            reason=reason,
            by=by,
            verdict=verdict,
            count_calls=count_calls,
        )
        self._receipts.append(receipt)
        return receipt

    def record(self, receipt: Receipt, state: State, note: str = "") -> None:
        """Set the state of the receipt, and append an entry."""
        receipt.state = state
        receipt.note = note
        entry = Entry(
            serial=receipt.serial,
            id=receipt.id,
            target=receipt.target,
            owner=receipt.owner,
            scope=receipt.scope_text,
            state=state,
            reason=receipt.reason,
            by=receipt.by,
            time=datetime.now(UTC),
            pid=os.getpid(),
            verdict=str(receipt.verdict),
            note=note,
        )
        self._entries.append(entry)
        self._journal.write(_line(entry))


def _line(entry: Entry) -> dict[str, object]:
    """An entry in the format of the journal."""
    return {**vars(entry), "time": entry.time.isoformat()}


def caller() -> str:
    """`file:line` of the innermost frame that is not in this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(module: str) -> bool:
    return module == _PACKAGE or module.startswith(f"{_PACKAGE}.") or module == "contextlib"


LEDGER: Final = Ledger()
