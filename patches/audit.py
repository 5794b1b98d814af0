"""The audit: the ledger compared with the live objects, and with the copies of targets in other modules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from .activation import ACTIVATIONS
from .errors import TargetError
from .ledger import LEDGER, Entry, State, aligned
from .patch import Patch
from .plan import resolve
from .registry import REGISTRY

__all__ = ["Alias", "Audit", "Row", "aliases", "audit"]


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
    passed: int | None = None
    """Number of those calls that the wrapper marked as passed through; it acted on the others."""
    aliases: tuple[str, ...] = ()
    """Copies of the target that still hold the original, so that calls bypass the patch; only on request."""


# Owner and note would make the lines too long to read; they are in the JSON.
_COLUMNS: Final = tuple(
    field.name for field in fields(Row) if field.name not in ("owner", "note", "calls", "passed", "aliases")
)


class Audit(tuple[Row, ...]):
    """Rows, oldest first. `str()` is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no patch is active"
        counts = [name for name in ("calls", "passed") if any(getattr(row, name) for row in self)]
        counted = any(row.calls is not None for row in self)
        columns = (*_COLUMNS, *dict.fromkeys(["calls", *counts] if counted else []))
        values = [[getattr(row, name) for name in columns] for row in self]
        table = aligned(columns, [["" if value is None else str(value) for value in line] for line in values])
        passing = [f"calls pass by {row.id} through {', '.join(row.aliases)}" for row in self if row.aliases]
        return "\n".join((table, *passing))

    def to_json(self) -> str:
        """A JSON array with one object per row."""
        import json

        return json.dumps([asdict(row) for row in self], indent=2)


def audit(*, include_reverted: bool = False, aliases: bool = False) -> Audit:
    """List every patch that is active, and every one that was undone but is still in place.

    With `include_reverted`, also everything that was ever applied in this process or skipped as obsolete. With
    `aliases`, every loaded module is searched for copies of the targets, which takes some tenths of a second for
    each patch.
    """
    ACTIVATIONS.pending.notice()
    with ACTIVATIONS.lock:
        rows = {}
        for receipt in ACTIVATIONS.known():
            state = ACTIVATIONS.condition(receipt)
            copies = _unpatched_copies(receipt.patch) if aliases and state == State.ACTIVE else ()
            rows[receipt.serial] = _row(Entry.of(receipt, state), copies)
        past = {entry.serial: entry for entry in LEDGER.entries if entry.serial not in rows} if include_reverted else {}
        rows |= {serial: _row(entry) for serial, entry in past.items()}
        return Audit(rows[serial] for serial in sorted(rows))


def _row(entry: Entry, aliases: tuple[str, ...] = ()) -> Row:
    facts: Any = {field.name: getattr(entry, field.name) for field in fields(Row) if field.name != "aliases"}
    return Row(**{**facts, "since": entry.since.isoformat(timespec="seconds")}, aliases=aliases)


# Copies ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A copy of a target, as it is now."""

    where: str
    """`module:name`, `module:Class.name`, `module:TABLE['key']` or `module:LIST[0]`."""
    holds: Literal["original", "patched"]
    """"original": calls through it are not patched, where patches are active. "patched": it was rewritten, or copied
    while a patch was active.
    """


def aliases(patch: str | Patch) -> list[Alias]:
    """Every copy of a patch's target, or of a target, found by identity in the modules that are loaded.

    Looks into every module, and into the classes, dictionaries and lists stored in one; imports the target's module
    and nothing else. Copies in closures, partials, default arguments and instances are not found, nor are those of
    classmethods, properties and values. Raises UnknownPatchError, TargetError.
    """
    if isinstance(patch, str):
        patch = _looked_up(patch) if ":" in patch else REGISTRY.get(patch)
    place = resolve(patch)
    with ACTIVATIONS.lock:
        copies = ACTIVATIONS.copies(place.target, place.kind)
        found = [Alias(where=str(copy), holds="original") for copy in copies.of_original()]
        found += [Alias(where=str(copy), holds="patched") for copy in copies.of_installed()]
    return sorted(found, key=lambda alias: alias.where)


def _unpatched_copies(patch: Patch) -> tuple[str, ...]:
    if patch.aliases == "ignore":
        return ()
    copies = ACTIVATIONS.copies(resolve(patch).target, patch.kind)
    return tuple(sorted(map(str, copies.of_original(spared=patch.spared()))))


def _looked_up(target: str) -> Patch:
    """A patch by which to look a target up: of any kind, or of kind "class", which "auto" refuses to patch."""
    about: Any = {"id": "patches.aliases", "target": target, "wrapper": lambda *_: None, "reason": "to look it up"}
    try:
        resolve(made := Patch(**about, kind="class"))
    except TargetError:
        return Patch(**about)
    return made
