"""The ledger: who applied which patch where, when and why, and its current state."""

from __future__ import annotations

import enum
import itertools
import os
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from .journal import Journal
from .patch import Patch, Scope
from .versions import owner_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .plan import Verdict

__all__ = ["LEDGER", "Calls", "Entry", "Ledger", "Receipt", "State", "aligned"]

_LENGTH: Final = 4_000
"""Number of entries that are kept; those of patches in force are kept in any case."""


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


_OVER: Final = (State.REVERTED, State.SKIPPED)
_SHARED: Final = ("serial", "id", "target", "owner", "reason", "by", "since", "note", "calls", "passed")


@dataclass(eq=False, slots=True)
class Calls:
    """Number of calls of one wrapper, and of those that it has marked as passed through."""

    made: int = 0
    passed: int = 0


@dataclass(kw_only=True, eq=False, repr=False, slots=True, weakref_slot=True)
class Receipt:
    """One application of one patch. Compares by identity, and keeps no patched object alive."""

    serial: int
    patch: Patch
    scope: Scope | None
    reason: str
    by: str
    verdict: Verdict
    count_calls: bool = False
    target: str = field(init=False)
    """The target of the patch, or the one of several that was there."""
    since: datetime = field(init=False, default_factory=lambda: datetime.now(UTC))
    pid: int = field(init=False, default_factory=os.getpid)
    state: State = field(init=False, default=State.SKIPPED)
    """State by the ledger's latest entry, set by the ledger alone; `audit()` compares it with the live objects."""
    note: str = field(init=False, default="")
    disabled: bool = field(init=False, default=False)
    """Whether it is applied but without effect until it is enabled again."""
    _calls: Calls | None = field(init=False, default=None)
    _before: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        self.target = str(self.patch.target)
        self.reason = self.reason or self.patch.reason
        self.count_calls = self.count_calls or bool(os.environ.get("PATCHES_COUNT"))

    def __deepcopy__(self, memo: object = None) -> Receipt:
        return self  # a copy of what holds it is of the same application

    __copy__ = __deepcopy__

    def count(self, calls: Calls) -> None:
        """Count from now on what `calls` counts."""
        self._calls, self._before = calls, (calls.made, calls.passed)

    @property
    def calls(self) -> int | None:
        """Number of calls through the wrapper since this was applied; None if calls are not counted.

        If several receipts hold the same patch at the same place, each counts the calls of all.
        """
        return None if self._calls is None else self._calls.made - self._before[0]

    @property
    def passed(self) -> int | None:
        """Number of those calls that the wrapper has marked with `patches.passed`; it acted on the others."""
        return None if self._calls is None else self._calls.passed - self._before[1]

    def extend(self, instances: Iterable[object]) -> None:
        """Cover these objects as well, from now on. Raises ScopeError if it is not limited to objects."""
        from .errors import ScopeError

        if self.scope is None or self.scope.predicate is not None or self.state not in (State.ACTIVE, State.DISABLED):
            why = f"it is {self.state}, on {self.scope_text}"
            raise ScopeError(f"{self.id!r} cannot be extended to more objects: {why}", patch_id=self.id)
        self.scope.add(tuple(instances))

    @property
    def id(self) -> str:
        """The id of the patch."""
        return self.patch.id

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
    since: datetime
    """Time of application."""
    time: datetime
    pid: int
    verdict: str
    note: str
    calls: int | None
    """Number of calls through the wrapper until then; None if calls are not counted."""
    passed: int | None

    @classmethod
    def of(cls, receipt: Receipt, state: State) -> Entry:
        """An entry for now."""
        shared: Any = {name: getattr(receipt, name) for name in _SHARED}
        verdict, scope = str(receipt.verdict), receipt.scope_text
        return cls(**shared, state=state, verdict=verdict, scope=scope, time=datetime.now(UTC), pid=os.getpid())


class Ledger:
    """Entries, oldest first: the last 4,000, and those of patches in force. Writers hold the lock of the slots.

    Receipts are kept only while they are in force: then nothing of what was patched is kept alive either.
    """

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=_LENGTH)
        self._in_force: dict[int, tuple[Receipt, Entry]] = {}
        self._serials = itertools.count(1)
        self._journal = Journal(self._inherited, self._counted)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that are kept, oldest first."""
        recent = list(self._entries)
        in_force = self._in_force.copy().values()
        older = (entry for _, entry in in_force if recent and entry.time < recent[0].time)
        return (*older, *recent)

    def open(self, patch: Patch, **given: Any) -> Receipt:
        """Create a receipt from the other arguments of `Receipt`, without recording anything yet."""
        return Receipt(serial=next(self._serials), patch=patch, **given)

    def record(self, receipt: Receipt, state: State, note: str = "") -> None:
        """Set the state of the receipt, and append an entry."""
        receipt.state, receipt.note = state, note
        entry = Entry.of(receipt, state)
        self._entries.append(entry)
        if state in _OVER:
            self._in_force.pop(receipt.serial, None)
        else:
            self._in_force[receipt.serial] = receipt, entry
        self._journal.write(_line(entry))

    def _inherited(self) -> list[dict[str, object]]:
        """The lines of a child made by fork, which counts its own calls."""
        for receipt, _ in self._in_force.values():
            if receipt._calls is not None:
                receipt.count(receipt._calls)
        return [_line(entry) for entry in self.entries]

    def _counted(self) -> list[dict[str, object]]:
        """The lines of patches in force whose calls are counted."""
        counted = [receipt for receipt, _ in self._in_force.copy().values() if receipt.count_calls]
        return [_line(Entry.of(receipt, receipt.state)) for receipt in counted]


def _line(entry: Entry) -> dict[str, object]:
    """An entry in the format of the journal."""
    return {**vars(entry), "since": entry.since.isoformat(), "time": entry.time.isoformat()}


LEDGER: Final = Ledger()


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with each column as wide as its widest text, in which line breaks become spaces."""
    lines = [[" ".join(text.split("\n")) for text in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
