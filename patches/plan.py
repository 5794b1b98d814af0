"""Plans: which patches a transaction applies, in which order, to what, and which it skips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .activation import ACTIVATIONS
from .errors import IncompatibleError, ProbeError, ScopeError
from .order import in_order, refuse_conflicts
from .patch import Patch
from .registry import REGISTRY
from .scope import Scope, Scoped
from .scope import on as limit
from .target import Kind, Place, locate
from .verdict import Verdict, VerdictKind, judge

__all__ = ["Item", "Plan", "Step", "make_plan", "verdict"]

Item: TypeAlias = str | Patch | Scoped
"""What a transaction takes: an id, a patch, or either limited to instances by `on`."""

_Request: TypeAlias = tuple[Patch, tuple[object, ...] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One patch to apply; to the whole process where `scope` is None."""

    patch: Patch
    scope: Scope | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Steps in the order of application, and what is left out because it is obsolete."""

    steps: tuple[Step, ...]
    skipped: tuple[Step, ...]


def verdict(patch: str | Patch) -> Verdict:
    """What the installed versions, the target and the probe say of a patch. Applies nothing."""
    return judge(_patch(patch), _resolve)


def make_plan(items: Iterable[Item], *, on: Sequence[object] | None = None, force: bool = False) -> Plan:
    """Everything about these items that can be settled before anything is changed.

    `on` limits every item that is not limited itself. `force` keeps obsolete patches, and those whose probe
    raised. Raises UnknownPatchError, ConflictError, CycleError, IncompatibleError, ProbeError, ScopeError.
    """
    requests = _with_needs([_request(item, on) for item in items])
    patches = [patch for patch, _ in requests]
    refuse_conflicts(patches)
    rank = {patch_id: position for position, patch_id in enumerate(in_order(patches))}
    verdicts = {patch.id: _acceptable(patch, force=force) for patch in patches}
    steps = [
        Step(patch=patch, scope=_scope(patch, instances), verdict=verdicts[patch.id])
        for patch, instances in sorted(requests, key=lambda request: rank[request[0].id])
    ]
    return Plan(
        steps=tuple(step for step in steps if force or not _obsolete(step)),
        skipped=tuple(step for step in steps if not force and _obsolete(step)),
    )


def _request(item: Item, on: Sequence[object] | None) -> _Request:
    if isinstance(item, Scoped):
        return _patch(item.patch), item.instances
    if on is None:
        return _patch(item), None
    return _request(limit(item, on), None)


def _patch(patch: str | Patch) -> Patch:
    return REGISTRY.get(patch) if isinstance(patch, str) else patch


def _with_needs(requests: Sequence[_Request]) -> list[_Request]:
    """The requests, completed by what they need and nobody asked for, in the scope of who needs it."""
    asked = {patch.id for patch, _ in requests}
    complete = list(requests)
    for patch, instances in complete:  # grows while it is walked, so needs of needs are met too
        for needed in (REGISTRY.get(needed) for needed in patch.needs if needed not in asked):
            if not any(other is needed and covered is instances for other, covered in complete):
                complete.append((needed, instances))
    return complete


def _acceptable(patch: Patch, *, force: bool) -> Verdict:
    found = verdict(patch)
    if found.kind == VerdictKind.INCOMPATIBLE:
        raise IncompatibleError(f"{patch.id!r} cannot be applied: {found.why}", patch_id=patch.id, why=found.why)
    if found.probe_error is not None and not force:
        raise ProbeError(
            f"{patch.id!r} was not applied: {found.why}, so it is not known whether the patch is needed; "
            "correct the probe, or pass force=True",
            patch_id=patch.id,
        ) from found.probe_error
    return found


def _obsolete(step: Step) -> bool:
    return step.verdict.kind == VerdictKind.OBSOLETE


def _scope(patch: Patch, instances: tuple[object, ...] | None) -> Scope | None:
    if instances is None:
        return None
    kind = _resolve(patch.target, patch.kind).kind
    if patch.subject is None and kind in (Kind.FUNCTION, Kind.STATICMETHOD):
        raise ScopeError(
            f"{patch.id!r} cannot be limited to instances: {patch.target!r} is a {kind}, which is called "
            "without one; give the patch a `subject` that picks the deciding object from the arguments",
            patch_id=patch.id,
        )
    return Scope(instances, patch_id=patch.id)


def _resolve(target: str, kind: str) -> Place:
    # Outside the lock the target's module is imported, which may take long, or wait for another thread.
    # Inside, it is there already.
    locate(target)
    with ACTIVATIONS.lock:
        return ACTIVATIONS.place(target, kind)
