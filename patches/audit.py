"""The audit: the ledger compared with the live objects, and with the copies of targets in other modules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Final, Literal

from .activation import ACTIVATIONS
from .errors import TargetError
from .ledger import LEDGER, Entry, Receipt, State
from .patch import Patch
from .plan import resolve
from .registry import REGISTRY
from .table import aligned

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
        table = aligned(columns, [[_text(getattr(row, name)) for name in columns] for row in self])
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
        ACTIVATIONS.catch_up()
        in_force = [*ACTIVATIONS.in_force(), *ACTIVATIONS.left_behind(), *ACTIVATIONS.failed()]
        rows = {receipt.serial: _row(receipt, aliases=aliases) for receipt in in_force}
        past = {entry.serial: entry for entry in LEDGER.entries if entry.serial not in rows} if include_reverted else {}
        rows |= {serial: _past_row(entry) for serial, entry in past.items()}
        return Audit(rows[serial] for serial in sorted(rows))


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
        passed=receipt.passed,
        aliases=_unpatched_copies(receipt.patch) if aliases and state == State.ACTIVE else (),
    )


def _past_row(entry: Entry) -> Row:
    return Row(
        id=entry.id,
        target=entry.target,
        state=entry.state,
        scope=entry.scope,
        since=entry.since.isoformat(timespec="seconds"),
        by=entry.by,
        reason=entry.reason,
        verdict=entry.verdict,
        owner=entry.owner,
        note=entry.note,
        calls=entry.calls,
        passed=entry.passed,
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


# Copies ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Another binding of a target, as it is now."""

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
    place_of = resolve(_looked_up(patch) if isinstance(patch, str) and ":" in patch else _declared(patch))
    with ACTIVATIONS.lock:
        copies = ACTIVATIONS.copies(place_of.target, place_of.kind)
        found = [
            *(Alias(where=str(binding), holds="original") for binding in copies.of_original()),
            *(Alias(where=str(binding), holds="patched") for binding in copies.of_installed()),
        ]
    return sorted(found, key=lambda alias: alias.where)


def _unpatched_copies(patch: Patch) -> tuple[str, ...]:
    """The copies through which calls bypass an active patch; empty if the patch ignores aliases."""
    if patch.aliases == "ignore":
        return ()
    copies = ACTIVATIONS.copies(resolve(patch).target, patch.kind)
    return tuple(sorted(map(str, copies.of_original(spared=patch.spared()))))


def _declared(patch: str | Patch) -> Patch:
    return REGISTRY.get(patch) if isinstance(patch, str) else patch


def _looked_up(target: str) -> Patch:
    """A patch by which to look a target up: of any kind, or of kind "class", which "auto" refuses to patch."""
    for kind in ("auto", "class"):
        made = Patch(id="patches.aliases", target=target, wrapper=lambda *_: None, reason="to look it up", kind=kind)
        try:
            resolve(made)
        except TargetError:
            continue
        return made
    return Patch(id="patches.aliases", target=target, wrapper=lambda *_: None, reason="to look it up")
