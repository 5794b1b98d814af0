"""Reduction of a set of patches to a smallest one that breaks something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

__all__ = ["smallest_cause"]


def smallest_cause(ids: Sequence[str], breaks: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """Find a subset of `ids`, in their order, that still breaks, and from which none can be left out.

    `breaks(ids)` must be true. One culprit among n costs about 2 log2(n) calls. (Delta debugging: Zeller and
    Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002.)
    """
    kept = tuple(ids)
    size = len(kept) // 2
    while size:
        reduced = next((rest for rest in _without_each(kept, size) if breaks(rest)), None)
        kept = reduced or kept
        size = min(size, len(kept) // 2) if reduced else size // 2
    return kept


def _without_each(ids: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(ids), size):
        rest = ids[:start] + ids[start + size :]
        if rest:
            yield rest
