"""Verdicts: whether the installed libraries need a patch, by versions, target and probe."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from .drift import find_drift, find_foreign
from .errors import TargetError
from .patch import Patch
from .target import Place
from .versions import Window, compare

__all__ = ["Verdict", "VerdictKind", "judge", "renew_locks"]


class VerdictKind(enum.StrEnum):
    """The five possible verdicts on a patch."""

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


_probed: Final[WeakKeyDictionary[Patch, bool]] = WeakKeyDictionary()
# Held while the probe of a patch runs, so that a thread that wants to apply that patch waits for the result. One
# lock per patch: probes import, and with a single lock a probe could deadlock with an import that waits for it.
_probing: Final[WeakKeyDictionary[Patch, threading.RLock]] = WeakKeyDictionary()
_probing_guard = threading.Lock()


def judge(patch: Patch, resolve: Callable[[Patch], Place], *, is_quiet: Callable[[], bool], fresh: bool) -> Verdict:
    """Judge `patch`.

    `resolve(patch)` imports and resolves the target, or raises TargetError. An answer of the probe is kept for the rest
    of the process if `is_quiet()`: no patch is active that could have changed it. `fresh` asks it again.
    """
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
    seen = None
    if patch.probe is not None:
        seen = _run_probe(patch, lambda: is_quiet() and not find_foreign(place), fresh=fresh)
    drift, foreign = find_drift(patch, place), () if patch.on_foreign == "allow" else find_foreign(place)
    if seen is not False and (drift or foreign):
        probe_error = seen if isinstance(seen, Exception) else None
        why = "; ".join((*drift, *foreign))
        return Verdict(kind=VerdictKind.UNKNOWN, why=why, probe_error=probe_error, drift=drift, foreign=foreign)
    same_source = bool(patch.fingerprint)
    if seen is None:
        return _judge_versions(window, same_source=same_source)
    return _judge_probe(window, seen=seen, same_source=same_source)


def _judge_versions(window: Window, *, same_source: bool) -> Verdict:
    if window.outside and same_source:
        return _same_source(window)
    if window.outside:
        return Verdict(kind=VerdictKind.UNKNOWN, why="; ".join(window.outside), outside=window.outside)
    return Verdict(kind=VerdictKind.NEEDED, why="; ".join(window.inside) or "it requires no particular version")


def _same_source(window: Window) -> Verdict:
    why = "; ".join((*window.outside, "the source is the one that the patch was written for"))
    return Verdict(kind=VerdictKind.NEEDED, why=why)


def _judge_probe(window: Window, *, seen: bool | Exception, same_source: bool) -> Verdict:
    if isinstance(seen, Exception):
        return Verdict(kind=VerdictKind.UNKNOWN, why=f"the probe raised {seen!r}", probe_error=seen)
    if not seen:
        ended = (f"absent since {window.since}",) if window.since else ()
        why = "; ".join(("the probe does not see the defect", *window.outside, *ended))
        return Verdict(kind=VerdictKind.OBSOLETE, why=why, since=window.since)
    if window.outside and same_source:
        return _same_source(window)
    if window.outside:
        why = "; ".join(("the probe sees the defect", *window.outside))
        return Verdict(kind=VerdictKind.UNKNOWN, why=why, outside=window.outside)
    return Verdict(kind=VerdictKind.NEEDED, why="; ".join(("the probe sees the defect", *window.inside)))


def _run_probe(patch: Patch, is_quiet: Callable[[], bool], *, fresh: bool) -> bool | Exception:
    assert patch.probe is not None
    with _probing_guard:
        mine = _probing.setdefault(patch, threading.RLock())
    with mine:
        if patch in _probed and not fresh:
            return _probed[patch]
        was_quiet = is_quiet()
        try:
            seen = bool(patch.probe())
        except Exception as error:  # noqa: BLE001 - any exception is the result of the probe
            return error
        if was_quiet and is_quiet():
            _probed[patch] = seen
        return seen


def renew_locks() -> None:
    """Forget probes in progress: in a child made by `fork`, the threads that run them do not exist."""
    global _probing_guard  # noqa: PLW0603 - a lock that another thread held cannot be released
    _probing_guard = threading.Lock()
    _probing.clear()
