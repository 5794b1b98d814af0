"""Plans: the patches that a transaction applies, in order, with their targets, and those that it skips."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias

from .activation import ACTIVATIONS
from .address import refuse
from .compose import is_traced
from .errors import DriftError, DriftWarning, IncompatibleError, ProbeError, ScopeError
from .ledger import caller
from .order import in_order, refuse_conflicts
from .patch import Patch
from .registry import REGISTRY
from .scope import Scope, Scoped
from .scope import on as limit
from .select import is_pattern, select
from .source import NoSourceError, fingerprint
from .table import aligned
from .target import Kind, Place, locate
from .verdict import Verdict, VerdictKind, judge

__all__ = [
    "Item",
    "Plan",
    "Step",
    "acceptable",
    "expand",
    "is_left_out",
    "is_seen_when_compiled",
    "make_plan",
    "plan",
    "resolve",
    "verdict",
]

Item: TypeAlias = str | Patch | Scoped
"""Item of a transaction: an id, a bundle, a selector (`patches.select`), a patch, or any of these limited by `on`."""

_Request: TypeAlias = tuple[Patch, tuple[object, ...] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One patch to apply, to the whole process if `scope` is None."""

    patch: Patch
    scope: Scope | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Steps in the order of application, and patches skipped because they are obsolete or set to skip."""

    steps: tuple[Step, ...]
    skipped: tuple[Step, ...]

    def explain(self) -> str:
        """A table of the patches to apply, in order, with targets and reasons; then the skipped ones."""
        if not self.steps and not self.skipped:
            return "nothing to apply"
        rows = [_explained(str(number), step) for number, step in enumerate(self.steps, start=1)]
        rows += [_explained("skip", step) for step in self.skipped]
        return aligned(("step", "id", "target", "scope", "verdict", "why"), rows)


def verdict(patch: str | Patch) -> Verdict:
    """The verdict on a patch from the installed versions, the target and the probe. Applies nothing."""
    return judge(_patch(patch), resolve)


def fingerprint_of(patch: str | Patch) -> str:
    """The fingerprint of the installed source of a patch's target. Raises TargetError if it has none."""
    declared = _patch(patch)
    place = resolve(declared.target, declared.kind)
    try:
        return fingerprint(place)
    except NoSourceError as error:
        raise refuse(declared.target, f"it has no fingerprint: {error}") from error


def make_plan(items: Iterable[Item], *, on: Sequence[object] | None = None, force: bool = False) -> Plan:
    """Plan the application of these items: everything that can be decided before anything is changed.

    `on` limits every item that has no limit of its own. `force` keeps obsolete patches, and those whose probe
    raised. Raises UnknownPatchError, ConflictError, CycleError, IncompatibleError, ProbeError, ScopeError.
    """
    requests = expand(items, on)
    patches = [patch for patch, _ in requests]
    refuse_conflicts(patches)
    rank = {patch_id: position for position, patch_id in enumerate(in_order(patches))}
    verdicts = {patch.id: acceptable(patch, force=force) for patch in patches}
    steps = [
        Step(patch=patch, scope=_scope(patch, instances), verdict=verdicts[patch.id])
        for patch, instances in sorted(requests, key=lambda request: rank[request[0].id])
    ]
    applied = tuple(step for step in steps if force or not is_left_out(step.patch, step.verdict))
    for step in applied:
        _refuse_to_limit(step)
    return Plan(steps=applied, skipped=tuple(step for step in steps if step not in applied))


def expand(items: Iterable[Item], on: Sequence[object] | None = None) -> list[_Request]:
    """Resolve items to patches, including the patches they need, each with the instances it is limited to.

    Imports no target.
    """
    return _with_needs(_requests(items, on))


def plan(*items: Item, on: Iterable[object] | None = None, force: bool = False) -> Plan:
    """Plan a `transaction` without running it: `print(patches.plan("a.b", "qlora-low-memory").explain())`.

    Changes nothing; probes run, and the libraries are imported. Raises the errors that the transaction would raise
    before its first change.
    """
    made = make_plan(items, on=None if on is None else tuple(on), force=force)
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        ACTIVATIONS.check([step.patch for step in made.steps])
    return made


def _requests(items: Iterable[Item], on: Sequence[object] | None) -> list[_Request]:
    """Patches and the instances they are limited to, without duplicates from overlapping selectors."""
    requests: list[_Request] = []
    for item in items:
        limited = item if isinstance(item, Scoped) or on is None else limit(item, on)
        selected = limited.patch if isinstance(limited, Scoped) else limited
        instances = limited.instances if isinstance(limited, Scoped) else None
        patches = [selected] if isinstance(selected, Patch) else [REGISTRY.get(found) for found in select(selected)]
        for patch in patches:
            overlaps = isinstance(selected, str) and is_pattern(selected)
            if not (overlaps and any(other is patch and covered is instances for other, covered in requests)):
                requests.append((patch, instances))
    return requests


def _patch(patch: str | Patch) -> Patch:
    return REGISTRY.get(patch) if isinstance(patch, str) else patch


def _with_needs(requests: Sequence[_Request]) -> list[_Request]:
    """The requests plus the patches that they need, each in the scope of the patch that needs it."""
    asked = {patch.id for patch, _ in requests}
    complete = list(requests)
    for patch, instances in complete:  # grows while it is iterated over, so needs of needs are included
        for needed in (REGISTRY.get(needed) for needed in patch.needs if needed not in asked):
            if not any(other is needed and covered is instances for other, covered in complete):
                complete.append((needed, instances))
    return complete


def acceptable(patch: Patch, *, force: bool) -> Verdict:
    """The verdict on a patch, if it allows applying or skipping. Raises IncompatibleError, ProbeError, DriftError."""
    found = verdict(patch)
    if found.kind in (VerdictKind.ABSENT, VerdictKind.INCOMPATIBLE):
        raise IncompatibleError(f"{patch.id!r} cannot be applied: {found.why}", patch_id=patch.id, why=found.why)
    if found.probe_error is not None and not force:
        raise ProbeError(
            f"{patch.id!r} was not applied: {found.why}, so it is not known whether the patch is needed; "
            "correct the probe, or pass force=True",
            patch_id=patch.id,
        ) from found.probe_error
    if "error" in _policies(patch, found) and not force:
        raise DriftError(
            f"{patch.id!r} was not applied: {found.why}; adapt the patch to it, say on_drift or on_foreign in its "
            "declaration, or pass force=True",
            patch_id=patch.id,
            why=found.why,
        )
    if "warn" in _policies(patch, found):
        file, _, line = caller().rpartition(":")
        warnings.warn_explicit(f"{patch.id!r} is applied, although {found.why}", DriftWarning, file, int(line))
    return found


def _policies(patch: Patch, found: Verdict) -> set[str]:
    """The patch's policies that the findings of its verdict invoke."""
    return {policy for policy, lines in ((patch.on_drift, found.drift), (patch.on_foreign, found.foreign)) if lines}


def is_seen_when_compiled(patch: Patch) -> bool:
    """Whether the patch takes effect in a region traced by torch.compile. Raises TargetError."""
    return is_traced(resolve(patch.target, patch.kind), [patch])


def is_left_out(patch: Patch, found: Verdict) -> bool:
    """Whether a patch with this verdict is skipped without an error."""
    return found.kind == VerdictKind.OBSOLETE or "skip" in _policies(patch, found)


def _explained(number: str, step: Step) -> tuple[str, ...]:
    scope = "process" if step.scope is None else str(step.scope)
    return number, step.patch.id, step.patch.target, scope, str(step.verdict), step.verdict.why


def _scope(patch: Patch, instances: tuple[object, ...] | None) -> Scope | None:
    return None if instances is None else Scope(instances, patch_id=patch.id)


def _refuse_to_limit(step: Step) -> None:
    """Raise ScopeError if the patch is limited to instances and its target has none."""
    patch = step.patch
    if step.scope is None:
        return
    kind = resolve(patch.target, patch.kind).kind
    if kind in (Kind.VALUE, Kind.CLASS):
        raise ScopeError(
            f"{patch.id!r} cannot be limited to instances: {patch.target!r} is a {kind}, which all read alike",
            patch_id=patch.id,
        )
    if patch.subject is None and kind in (Kind.FUNCTION, Kind.STATICMETHOD):
        raise ScopeError(
            f"{patch.id!r} cannot be limited to instances: {patch.target!r} is a {kind}, which is called "
            "without one; give the patch a `subject` that picks the deciding object from the arguments",
            patch_id=patch.id,
        )


def resolve(target: str, kind: str) -> Place:
    """Resolve a target to its place before any patch of ours; imports its module. Raises TargetError."""
    # The target's module is imported outside the lock, since that may take long or wait for another thread.
    # Inside the lock it is imported already.
    owner, name = locate(target)
    if isinstance(owner, ModuleType):
        getattr(owner, name, None)  # may import too, if the module imports on attribute access
    with ACTIVATIONS.lock:
        return ACTIVATIONS.place(target, kind)
