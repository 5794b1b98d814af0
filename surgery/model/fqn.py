"""Fully qualified names of modules and parameters, with and without the wrappers that sharding puts in between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from surgery.errors import SelectorError

__all__ = ["PEFT_PREFIX", "WRAPPER_SEGMENTS", "clean", "join", "match_any", "require_matches", "split"]

#: Attribute names under which FSDP1 and torch's activation checkpointing keep the module that they wrap.
WRAPPER_SEGMENTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

#: What PEFT puts before the names of the base model inside of its own.
PEFT_PREFIX = "base_model.model."


def clean(fqn: str) -> str:
    """`fqn` without wrapper segments: what the parameter is called in the unwrapped model."""
    return ".".join(segment for segment in fqn.split(".") if segment not in WRAPPER_SEGMENTS)


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or `name` alone at the root."""
    return f"{prefix}.{name}" if prefix else name


def split(fqn: str) -> tuple[str, str]:
    """`(parent, name)`; the parent of a root name is the empty string."""
    parent, _, name = fqn.rpartition(".")
    return parent, name


def match_any(fqn: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions is found in `fqn`."""
    return any(re.search(pattern, fqn) for pattern in patterns)


def require_matches(what: str, patterns: Sequence[str], fqns: Sequence[str]) -> None:
    """Raise `SelectorError` naming every pattern that matches none of `fqns`, with some names that exist."""
    lost = [pattern for pattern in patterns if not any(re.search(pattern, fqn) for fqn in fqns)]
    if not lost:
        return
    shown = ", ".join(fqns[:8]) + (f", ... ({len(fqns)} in all)" if len(fqns) > 8 else "")
    raise SelectorError(
        f"{what}: {', '.join(map(repr, lost))} matches no module, and modules alone count, with all their parameters. "
        f"Modules are: {shown}",
        patterns=lost,
    )
