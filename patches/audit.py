"""The audit: the ledger compared with the live objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final, overload

from .activation import ACTIVATIONS
from .aliases import unpatched_copies
from .ledger import LEDGER, Receipt, State
from .table import aligned

__all__ = ["Audit", "Row", "audit"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One application of one patch, as it is now."""

    id: str
    target: str
    state: State
    scope: str
    """`process`, or the number of living instances."""
    since: str
    """Time of application: ISO 8601, UTC, to the second."""
    by: str
    """`file:line` of the statement that applied it."""
    reason: str
    verdict: str
    owner: str
    note: str
    calls: int | None = None
    """Number of calls through the patch; None if calls are not counted."""
    aliases: tuple[str, ...] = ()
    """Copies of the target that still hold the original, so that calls bypass the patch; only on request."""


# Owner and note would make the lines too long to read; they are in the JSON.
_COLUMNS: Final = tuple(field.name for field in fields(Row) if field.name not in ("owner", "note", "calls", "aliases"))


class Audit(Sequence[Row]):
    """Rows, oldest first. `str()` is a table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._rows[index]

    def __str__(self) -> str:
        if not self._rows:
            return "no patch is active"
        columns = (*_COLUMNS, "calls") if any(row.calls is not None for row in self._rows) else _COLUMNS
        table = aligned(columns, [[_text(getattr(row, name)) for name in columns] for row in self._rows])
        passing = [f"calls pass by {row.id} through {', '.join(row.aliases)}" for row in self._rows if row.aliases]
        return "\n".join((table, *passing))

    def to_json(self) -> str:
        """A JSON array with one object per row."""
        return json.dumps([asdict(row) for row in self._rows], indent=2)


def audit(*, include_reverted: bool = False, aliases: bool = False) -> Audit:
    """List every patch that is active, and every one that was undone but is still in place.

    With `include_reverted`, also everything that was ever applied in this process or skipped as obsolete. With
    `aliases`, every loaded module is searched for copies of the targets, which takes some tenths of a second for
    each patch.
    """
    ACTIVATIONS.pending.notice()
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        listed = {*ACTIVATIONS.in_force(), *ACTIVATIONS.left_behind(), *ACTIVATIONS.failed()}
        receipts = [receipt for receipt in LEDGER.receipts if include_reverted or receipt in listed]
        return Audit([_row(receipt, aliases=aliases) for receipt in receipts])


def _row(receipt: Receipt, *, aliases: bool) -> Row:
    state = ACTIVATIONS.condition(receipt)
    return Row(
        id=receipt.id,
        target=receipt.target,
        state=state,
        scope=receipt.scope_text,
        since=receipt.since.isoformat(timespec="seconds"),
        by=receipt.by,
        reason=receipt.reason,
        verdict=str(receipt.verdict),
        owner=receipt.owner,
        note=receipt.note,
        calls=receipt.calls,
        aliases=unpatched_copies(receipt.patch) if aliases and state == State.ACTIVE else (),
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)
