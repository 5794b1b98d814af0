"""Verdicts: what a patch's versions, target and probe say of the libraries that are installed."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from .errors import TargetError
from .patch import Patch
from .versions import Window, compare

__all__ = ["Verdict", "VerdictKind", "judge"]


class VerdictKind(enum.StrEnum):
    """The four things that can be said of a patch."""

    NEEDED = "needed"
    """The defect is there: the probe sees it inside the window, or there is no probe and it is inside."""
    OBSOLETE = "obsolete"
    """The probe does not see the defect."""
    UNKNOWN = "unknown"
    """Outside the window, and no probe says that the defect is absent; or the probe raised."""
    INCOMPATIBLE = "incompatible"
    """A distribution is not installed, or the target does not resolve."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict and its grounds. `str()` gives the kind."""

    kind: VerdictKind
    why: str
    probe_error: Exception | None = None
    """What the probe raised."""

    def __str__(self) -> str:
        return self.kind.value


_probed: Final[WeakKeyDictionary[Patch, bool | Exception]] = WeakKeyDictionary()
# Held while a probe runs, so that no other thread applies the patch meanwhile: it waits for the result.
_probing: Final = threading.RLock()


def judge(patch: Patch, resolve: Callable[[str, str], object]) -> Verdict:
    """The verdict on `patch`. A probe runs once in the life of the process.

    `resolve(target, kind)` imports and finds the target; it raises TargetError where it cannot.
    """
    window = compare(patch.requires)
    if window.missing:
        return Verdict(kind=VerdictKind.INCOMPATIBLE, why=f"not installed: {', '.join(window.missing)}")
    try:
        resolve(patch.target, patch.kind)
    except TargetError as error:
        return Verdict(kind=VerdictKind.INCOMPATIBLE, why=str(error))
    if patch.probe is None:
        return _judge_versions(window)
    return _judge_probe(window, seen=_run_probe(patch))


def _judge_versions(window: Window) -> Verdict:
    if window.outside:
        return Verdict(kind=VerdictKind.UNKNOWN, why="; ".join(window.outside))
    return Verdict(kind=VerdictKind.NEEDED, why="; ".join(window.inside) or "it requires no particular version")


def _judge_probe(window: Window, *, seen: bool | Exception) -> Verdict:
    if isinstance(seen, Exception):
        return Verdict(kind=VerdictKind.UNKNOWN, why=f"the probe raised {seen!r}", probe_error=seen)
    if not seen:
        return Verdict(kind=VerdictKind.OBSOLETE, why="; ".join(("the probe does not see the defect", *window.outside)))
    if window.outside:
        why = "; ".join(("the probe sees the defect", *window.outside))
        return Verdict(kind=VerdictKind.UNKNOWN, why=why)
    return Verdict(kind=VerdictKind.NEEDED, why="; ".join(("the probe sees the defect", *window.inside)))


def _run_probe(patch: Patch) -> bool | Exception:
    assert patch.probe is not None
    with _probing:
        if patch not in _probed:
            try:
                _probed[patch] = bool(patch.probe())
            except Exception as error:  # noqa: BLE001 - whatever a probe raises is its result
                _probed[patch] = error
        return _probed[patch]
