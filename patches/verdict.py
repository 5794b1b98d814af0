"""Verdicts: what a patch's versions, target and probe say of the libraries that are installed."""

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

__all__ = ["Verdict", "VerdictKind", "judge"]


class VerdictKind(enum.StrEnum):
    """The four things that can be said of a patch."""

    NEEDED = "needed"
    """The defect is there: the probe sees it inside the window, or there is no probe and it is inside."""
    OBSOLETE = "obsolete"
    """The probe does not see the defect; or the target does not exist, in a version outside the window."""
    UNKNOWN = "unknown"
    """Outside the window, and neither a probe nor the fingerprint of the source can say more; or the probe raised;
    or the source or the signature is another; or somebody else's patch is there, and the patch does not allow it.
    """
    INCOMPATIBLE = "incompatible"
    """A distribution is not installed; or the target does not resolve, in a version that the patch is for."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict and its grounds. `str()` gives the kind."""

    kind: VerdictKind
    why: str
    probe_error: Exception | None = None
    """What the probe raised."""
    since: str = ""
    """Of an obsolete patch whose window has an upper end: the distribution and version that ended the defect."""
    drift: tuple[str, ...] = ()
    """How the target differs from what the patch declares; a line each."""
    foreign: tuple[str, ...] = ()
    """Who else has patched the target; looked for unless the patch allows it."""

    def __str__(self) -> str:
        return self.kind.value


_probed: Final[WeakKeyDictionary[Patch, bool | Exception]] = WeakKeyDictionary()
# Held while the probe of a patch runs, so that no other thread applies that patch meanwhile: it waits for the result.
# One for each patch: a probe imports, and with one lock for all, it could be waiting for an import that waits for it.
_probing: Final[WeakKeyDictionary[Patch, threading.RLock]] = WeakKeyDictionary()
_probing_guard: Final = threading.Lock()


def judge(patch: Patch, resolve: Callable[[str, str], Place]) -> Verdict:
    """The verdict on `patch`. A probe runs once in the life of the process.

    `resolve(target, kind)` imports and finds the target; it raises TargetError where it cannot.
    """
    window = compare(patch.requires)
    if window.missing:
        return Verdict(kind=VerdictKind.INCOMPATIBLE, why=f"not installed: {', '.join(window.missing)}")
    try:
        place = resolve(patch.target, patch.kind)
    except TargetError as error:
        # Code that is not there has no defect, in a version that was never known to have it.
        kind = VerdictKind.OBSOLETE if window.outside else VerdictKind.INCOMPATIBLE
        return Verdict(kind=kind, why="; ".join((str(error), *window.outside)), since=window.since)
    seen = None if patch.probe is None else _run_probe(patch)
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
        return Verdict(kind=VerdictKind.UNKNOWN, why="; ".join(window.outside))
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
        return Verdict(kind=VerdictKind.UNKNOWN, why=why)
    return Verdict(kind=VerdictKind.NEEDED, why="; ".join(("the probe sees the defect", *window.inside)))


def _run_probe(patch: Patch) -> bool | Exception:
    assert patch.probe is not None
    with _probing_guard:
        mine = _probing.setdefault(patch, threading.RLock())
    with mine:
        if patch not in _probed:
            try:
                _probed[patch] = bool(patch.probe())
            except Exception as error:  # noqa: BLE001 - whatever a probe raises is its result
                _probed[patch] = error
        return _probed[patch]
