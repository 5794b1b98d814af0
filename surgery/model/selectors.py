"""Selecting modules by pattern. A selector that matches nothing raises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from surgery.errors import SelectorError

__all__ = ["match_any", "require_matches"]


def match_any(fqn: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions is found in `fqn`."""
    return any(re.search(pattern, fqn) for pattern in patterns)


def require_matches(what: str, patterns: Sequence[str], fqns: Sequence[str]) -> None:
    """Raise `SelectorError` naming every pattern that matches none of `fqns`, with some names that exist."""
    lost = [pattern for pattern in patterns if not any(re.search(pattern, fqn) for fqn in fqns)]
    if not lost:
        return
    shown = ", ".join(fqns[:8]) + (f", ... ({len(fqns)} in all)" if len(fqns) > 8 else "")
    raise SelectorError(f"{what}: {', '.join(map(repr, lost))} matches no module. Modules are: {shown}", patterns=lost)
