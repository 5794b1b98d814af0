"""The ledger: who applied which patch where, when and why, and what has become of it."""

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
    """What has become of one application."""

    ACTIVE = "active"
    DISABLED = "disabled"
    """Applied, and without effect until it is enabled."""
    BURIED = "buried"
    """Somebody has put an object of theirs around ours."""
    OVERWRITTEN = "overwritten"
    """Somebody has replaced ours."""
    RELOADED = "reloaded"
    """The module was executed again, and its new definition replaced ours."""
    PENDING = "pending"
    """Not applied yet: it waits for its module to be imported."""
    FAILED = "failed"
    """Not applied: something was raised when its module had been imported."""
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
        """As of the ledger's latest entry, which alone writes it; `audit()` compares it with what is live."""
        self.note = ""
        self.disabled = False
        """Applied, without effect until it is enabled again."""
        self.count_calls = count_calls
        self.counter: CallCounter | None = None
        self.calls_before = 0

    @property
    def calls(self) -> int | None:
        """How many calls have gone through the wrapper since this was applied; None where nobody counts.

        Where several receipts hold one patch at one place, each sees the calls of all.
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
        """The distribution and version that declares the patch, or its module."""
        return owner_of(self.patch.module)

    @property
    def scope_text(self) -> str:
        """The word process, or how many living instances it covers."""
        return "process" if self.scope is None else str(self.scope)

    @property
    def left_behind(self) -> bool:
        """Undone, but what was installed could not be taken away because somebody else had replaced it."""
        return self.state in (State.BURIED, State.OVERWRITTEN, State.RELOADED)

    def __repr__(self) -> str:
        return f"<Receipt {self.serial}: {self.id} on {self.scope_text}, {self.state}>"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger: at `time`, the receipt with this `serial` went into `state`."""

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
    """Append-only. Whoever writes holds the slots' lock."""

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
        """A new receipt, of which nothing has been recorded yet."""
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
        """Put the receipt into `state`, and write that down."""
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
    """An entry as the journal has it."""
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
