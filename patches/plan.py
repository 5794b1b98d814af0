"""Verdicts: whether the installed libraries need a patch; and plans: what a transaction applies, in which order."""

from __future__ import annotations

import enum
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

from .activation import ACTIVATIONS
from .drift import NoSourceError, find_drift, fingerprint
from .errors import DriftError, DriftWarning, IncompatibleError, ProbeError, ScopeError, TargetError, VersionWarning
from .forms import prepare
from .ledger import State, aligned
from .patch import Chosen, Patch, Scope, Scoped, caller, chosen
from .patch import on as limit
from .registry import REGISTRY, atomic_bundles, is_pattern, select
from .slot import in_order, refuse_conflicts
from .target import STORED, Kind, Place, locate, refuse
from .versions import Window, compare

__all__ = [
    "Item", "Plan", "Step", "Verdict", "VerdictKind", "acceptable", "expand", "fingerprint_of", "is_left_out",
    "make_plan", "plan", "refuse_to_split", "resolve", "verdict",
]  # fmt: skip

# Verdicts -------------------------------------------------------------------------------------------------------------


class VerdictKind(enum.StrEnum):
    """The possible verdicts on a patch."""

    NEEDED = "needed"
    """The defect is present: inside the window, the probe finds it or there is no probe."""
    OBSOLETE = "obsolete"
    """The probe does not find the defect; or the target does not exist, in a version outside the window."""
    UNKNOWN = "unknown"
    """Undecided: the versions are outside the window, and neither a probe nor the source's fingerprint can decide;
    or the probe raised; or the source or the signature differs; or somebody else has patched the target, and the
    patch does not allow that.
    """
    ABSENT = "absent"
    """A distribution that it requires, or the top-level module of its target, is not installed."""
    INCOMPATIBLE = "incompatible"
    """The target does not resolve, in a version inside the window."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict and its reasons. `str()` gives the kind."""

    kind: VerdictKind
    why: str
    probe_error: Exception | None = None
    """The exception that the probe raised."""
    since: str = ""
    """Distribution and version that fixed the defect, for an obsolete patch whose window has an upper end."""
    drift: tuple[str, ...] = ()
    """Differences between the target and the patch's declaration, one line each."""
    foreign: tuple[str, ...] = ()
    """Foreign patches of the target; searched for unless the patch allows them."""
    gone: bool = False
    """Whether the target of an optional patch is not there."""
    suggestion: str = ""
    """A target spelt almost like one whose module is not installed."""
    outside: tuple[str, ...] = ()
    """Versions outside the patch's window, one line each, if nothing else could decide."""

    def __str__(self) -> str:
        return self.kind.value


def verdict(patch: str | Patch, *, fresh: bool = False) -> Verdict:
    """The verdict on a patch from the installed versions, the target and the probe. Applies nothing.

    The answer of a probe is kept for the rest of the process, unless a patch was active that could have changed it;
    `fresh` asks it again.
    """
    patch = _patch(patch)
    for receipt in ACTIVATIONS.active() if patch.probe is not None else ():
        if receipt.patch is patch and ACTIVATIONS.condition(receipt) == State.ACTIVE:
            return receipt.verdict  # the probe would see what the patch makes of the target
    window = compare(patch.requires)
    if window.missing:
        why = f"not installed: {', '.join(window.missing)}"
        return Verdict(kind=VerdictKind.ABSENT, why=why, gone=patch.optional)
    try:
        place = resolve(patch)
    except TargetError as error:
        top_level = error.target.partition(":")[0].partition(".")[0]
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == top_level:
            why = f"not installed: module {top_level}"
            return Verdict(kind=VerdictKind.ABSENT, why=why, gone=patch.optional, suggestion=error.suggestion)
        # In a version that was never known to have the defect, missing code cannot have it.
        gone = patch.optional and error.is_absent
        kind = VerdictKind.OBSOLETE if window.outside or gone else VerdictKind.INCOMPATIBLE
        return Verdict(kind=kind, why="; ".join((str(error), *window.outside)), since=window.since, gone=gone)
    seen = None if patch.probe is None else _run_probe(patch, place, fresh=fresh)
    drift, foreign = find_drift(patch, place), () if patch.on_foreign == "allow" else _foreign(place)
    if seen is not False and (drift or foreign):
        probe_error = seen if isinstance(seen, Exception) else None
        why = "; ".join((*drift, *foreign))
        return Verdict(kind=VerdictKind.UNKNOWN, why=why, probe_error=probe_error, drift=drift, foreign=foreign)
    return _decide(window, seen=seen, same_source=bool(patch.fingerprint))


def _decide(window: Window, *, seen: bool | Exception | None, same_source: bool) -> Verdict:
    if isinstance(seen, Exception):
        return Verdict(kind=VerdictKind.UNKNOWN, why=f"the probe raised {seen!r}", probe_error=seen)
    if seen is False:
        ended = (f"absent since {window.since}",) if window.since else ()
        why = "; ".join(("the probe does not see the defect", *window.outside, *ended))
        return Verdict(kind=VerdictKind.OBSOLETE, why=why, since=window.since)
    if window.outside and same_source:
        why = "; ".join((*window.outside, "the source is the one that the patch was written for"))
        return Verdict(kind=VerdictKind.NEEDED, why=why)
    probed = ("the probe sees the defect",) if seen else ()
    if window.outside:
        why = "; ".join((*probed, *window.outside))
        return Verdict(kind=VerdictKind.UNKNOWN, why=why, outside=window.outside)
    why = "; ".join((*probed, *window.inside)) or "it requires no particular version"
    return Verdict(kind=VerdictKind.NEEDED, why=why)


def _foreign(place: Place) -> tuple[str, ...]:
    from .foreign.source import find_foreign

    return find_foreign(place)


def _run_probe(patch: Patch, place: Place, *, fresh: bool) -> bool | Exception:
    assert patch.probe is not None
    with _probing_guard:
        mine = _probing.setdefault(patch, threading.RLock())
    with mine:
        if patch in _probed and not fresh:
            return _probed[patch]
        packages = {target.module.partition(".")[0] for target in patch.targets}
        was_quiet = ACTIVATIONS.is_quiet(packages) and not _foreign(place)
        try:
            seen = bool(patch.probe())
        except Exception as error:  # noqa: BLE001 - any exception is the result of the probe
            return error
        if was_quiet and ACTIVATIONS.is_quiet(packages):
            _probed[patch] = seen
        return seen


_probed: Final[WeakKeyDictionary[Patch, bool]] = WeakKeyDictionary()
# Held while the probe of a patch runs, so that a thread that wants to apply that patch waits for the result. One
# lock per patch: probes import, and with a single lock a probe could deadlock with an import that waits for it.
_probing: Final[WeakKeyDictionary[Patch, threading.RLock]] = WeakKeyDictionary()
_probing_guard = threading.Lock()


def _forget_probes_in_progress() -> None:
    # In a child made by `fork`, the threads that run them do not exist, and their locks cannot be released.
    global _probing_guard  # noqa: PLW0603
    _probing_guard = threading.Lock()
    _probing.clear()


os.register_at_fork(after_in_child=_forget_probes_in_progress)


# Plans ----------------------------------------------------------------------------------------------------------------

Item: TypeAlias = str | Patch | Scoped
"""Item of a transaction: an id, a bundle, a selector (`patches.select`), a patch, or any of these limited by `on`."""

_Request: TypeAlias = tuple[Patch, Chosen | None]


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

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """A table of the patches to apply, in order, with targets and reasons; then the skipped ones."""
        if not self.steps and not self.skipped:
            return "nothing to apply"
        numbered = [*enumerate(self.steps, start=1), *(("skip", step) for step in self.skipped)]
        rows = [
            (
                str(number),
                step.patch.id,
                str(step.patch.target),
                "process" if step.scope is None else str(step.scope),
                str(step.verdict),
                step.verdict.why,
            )
            for number, step in numbered
        ]
        return aligned(("step", "id", "target", "scope", "verdict", "why"), rows)


def fingerprint_of(patch: str | Patch) -> str:
    """The fingerprint of the installed source of a patch's target. Raises TargetError if it has none."""
    place = resolve(_patch(patch))
    try:
        return fingerprint(place)
    except NoSourceError as error:
        raise refuse(place.target, f"it has no fingerprint: {error}") from error


def make_plan(items: Iterable[Item], *, on: Chosen | None = None, force: bool = False) -> Plan:
    """Plan the application of these items: everything that can be decided before anything is changed.

    `on` limits every item that has no limit of its own. `force` keeps obsolete patches, and those whose probe
    raised. Raises UnknownPatchError, ConflictError, CycleError, IncompatibleError, ProbeError, ScopeError.
    """
    items = tuple(items)
    requests = expand(items, on)
    patches = [patch for patch, _ in requests]
    refuse_conflicts(patches)
    rank = {patch_id: position for position, patch_id in enumerate(in_order(patches))}
    verdicts = {patch.id: acceptable(patch, force=force) for patch in dict.fromkeys(patches)}
    left_out = [patch for patch in patches if is_left_out(patch, verdicts[patch.id], force=force)]
    refuse_to_split(items, [] if force else left_out)
    steps = [
        Step(
            patch=patch,
            scope=None if instances is None else Scope(instances, patch_id=patch.id),
            verdict=verdicts[patch.id],
        )
        for patch, instances in sorted(requests, key=lambda request: rank[request[0].id])
    ]
    applied = tuple(step for step in steps if step.patch not in left_out)
    for step in applied:
        if step.scope is not None:
            _refuse_to_limit(step.patch, step.scope)
    return Plan(steps=applied, skipped=tuple(step for step in steps if step not in applied))


def refuse_to_split(items: Iterable[Item], left_out: Iterable[Patch]) -> None:
    """Raise IncompatibleError if some but not all members of an atomic bundle would be left out."""
    missing = {patch.id: patch for patch in left_out}
    selected = (item.patch if isinstance(item, Scoped) else item for item in items)
    for name in (name for item in selected if isinstance(item, str) for name in atomic_bundles(item)):
        members = select(name)
        absent = [patch_id for patch_id in members if patch_id in missing]
        if absent and len(absent) < len(members):
            why = "; ".join(f"{one} is {(found := verdict(missing[one]))}: {found.why}" for one in absent)
            raise IncompatibleError(
                f"the bundle {name!r} is atomic and was not applied, since it would not be whole: {why}; "
                "apply its members by their ids, or pass force=True",
                patch_id=absent[0],
                why=why,
            )


def expand(items: Iterable[Item], on: Chosen | None = None) -> list[_Request]:
    """Resolve items to patches, each with the instances it is limited to, and so are the patches that it needs.

    Imports no target.
    """
    requests = _requests(items, on)
    asked = {patch.id for patch, _ in requests}
    for patch, instances in requests:  # grows while it is iterated over, so needs of needs are included
        for needed in (REGISTRY.get(needed) for needed in patch.needs if needed not in asked):
            if not any(other is needed and covered is instances for other, covered in requests):
                requests.append((needed, instances))
    return requests


def plan(*items: Item, on: Iterable[object] | Callable[[Any], bool] | None = None, force: bool = False) -> Plan:
    """Plan a `transaction` without running it: `print(patches.plan("a.b", "qlora-low-memory").explain())`.

    Changes nothing; probes run, and the libraries are imported. Raises the errors that the transaction would raise
    before its first change.
    """
    made = make_plan(items, on=chosen(on), force=force)
    with ACTIVATIONS.lock:
        ACTIVATIONS.catch_up()
        ACTIVATIONS.check([step.patch for step in made.steps], resolve)
    return made


def _requests(items: Iterable[Item], on: Chosen | None) -> list[_Request]:
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


def acceptable(patch: Patch, *, force: bool) -> Verdict:
    """The verdict on a patch, if it allows applying or skipping. Raises IncompatibleError, ProbeError, DriftError."""
    found = verdict(patch)
    if found.kind in (VerdictKind.ABSENT, VerdictKind.INCOMPATIBLE) and not found.gone:
        target = f", for {patch.target!r}" if found.kind == VerdictKind.ABSENT else ""
        hint = f"; did you mean {found.suggestion!r}?" if found.suggestion else ""
        message = f"{patch.id!r} cannot be applied: {found.why}{target}{hint}"
        raise IncompatibleError(message, patch_id=patch.id, why=found.why)
    if found.probe_error is not None and not force:
        raise ProbeError(
            f"{patch.id!r} was not applied: {found.why}, so it is not known whether the patch is needed; "
            "correct the probe, or pass force=True",
            patch_id=patch.id,
        ) from found.probe_error
    policies = _policies(patch, found)
    if "error" in policies.values() and not force:
        fields = " and ".join(name for name, policy in policies.items() if policy == "error")
        raise DriftError(
            f"{patch.id!r} was not applied: {found.why}; adapt the patch to it, set {fields} in its declaration, "
            "or pass force=True",
            patch_id=patch.id,
            why=found.why,
        )
    if "warn" in policies.values() and "skip" not in policies.values():
        file, _, line = caller().rpartition(":")
        kind = VersionWarning if found.outside else DriftWarning
        warnings.warn_explicit(f"{patch.id!r} is applied, although {found.why}", kind, file, int(line))
    return found


def _policies(patch: Patch, found: Verdict) -> dict[str, str]:
    """The fields of the patch that say what to do about the findings of its verdict: name -> policy."""
    findings = {"on_drift": found.drift, "on_foreign": found.foreign, "on_unknown": found.outside}
    return {name: getattr(patch, name) for name, lines in findings.items() if lines}


def is_left_out(patch: Patch, found: Verdict, *, force: bool) -> bool:
    """Whether a patch with this verdict is skipped without an error."""
    is_skipped = found.kind == VerdictKind.OBSOLETE or "skip" in _policies(patch, found).values()
    return found.gone or (is_skipped and not force)


def _refuse_to_limit(patch: Patch, scope: Scope) -> None:
    """Raise ScopeError if the patch's target has no instances to be limited to, or one is taken for a predicate."""
    place = resolve(patch)
    why = f"{patch.id!r} cannot be limited to instances: {str(place.target)!r} is a {place.kind}"
    if place.kind in STORED:
        raise ScopeError(
            f"{why}, which all read alike; patch what reads it, or say kind='attribute' for what instances store",
            patch_id=patch.id,
        )
    if isinstance(place.owner, type) and isinstance(scope.predicate, place.owner):
        what = f"an object of {place.owner.__qualname__!r}, which can be called; to limit it to that one, pass [it]"
        raise ScopeError(f"{patch.id!r} is limited by a predicate that is {what}", patch_id=patch.id)
    if patch.subject is None and place.kind in (Kind.FUNCTION, Kind.STATICMETHOD):
        raise ScopeError(
            f"{why}, which is called without one; give the patch a `subject` that picks the deciding object from the "
            "arguments",
            patch_id=patch.id,
        )


def resolve(patch: Patch) -> Place:
    """Resolve a patch's target to its place before any patch of ours; imports its module.

    Of several targets, takes the first that is there. Raises TargetError.
    """
    problems: list[TargetError] = []
    for target in patch.targets:
        try:
            # The target's module is imported outside the lock, since that may take long or wait for another thread.
            # Inside the lock it is imported already.
            owner = locate(target)
            if isinstance(owner, ModuleType):
                getattr(owner, target.name, None)  # may import too, if the module imports on attribute access
            with ACTIVATIONS.lock:
                place = ACTIVATIONS.place(target, patch.kind)
            prepare(place)
            return place  # noqa: TRY300 - with an `else`, the lock would be beside it
        except TargetError as error:
            problems.append(error)
            if not error.is_absent:
                break
    if len(problems) == 1:
        raise problems[0]
    why = "; ".join(f"{problem.target!r}: {problem.why}" for problem in problems)
    absent = all(problem.is_absent for problem in problems)
    raise refuse(" or ".join(map(str, patch.targets)), why, is_absent=absent)
