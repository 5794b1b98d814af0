"""Order and conflicts of patches that are active together."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import ConflictError, CycleError
from .patch import Patch

__all__ = ["in_order", "refuse_conflicts"]


def in_order(patches: Iterable[Patch]) -> list[str]:
    """Sort the ids by the patches' `after` constraints, otherwise as given. Raises CycleError."""
    waiting = {patch.id: patch for patch in patches}
    present = frozenset(waiting)
    ordered: list[str] = []
    while waiting:
        ready = next((key for key in waiting if not _before(waiting[key], present) & waiting.keys()), None)
        if ready is None:
            raise _cycle(waiting)
        ordered.append(ready)
        del waiting[ready]
    return ordered


def refuse_conflicts(patches: Iterable[Patch]) -> None:
    """Raise ConflictError if two of the patches may not be active together, or have the same id."""
    by_id: dict[str, Patch] = {}
    for patch in patches:
        other = by_id.setdefault(patch.id, patch)
        if other is not patch:
            raise ConflictError(
                f"two patches have the id {patch.id!r}: {other.claimant} and {patch.claimant}; use one",
                patch_ids=(other.id, patch.id),
            )
    for patch in by_id.values():
        for conflicting in patch.conflicts:
            if conflicting in by_id:
                raise ConflictError(
                    f"{patch.id!r} ({patch.claimant}) says that it may not be active together with "
                    f"{conflicting!r} ({by_id[conflicting].claimant}); leave one out, or revert it first",
                    patch_ids=(patch.id, conflicting),
                )


def _before(patch: Patch, present: frozenset[str]) -> frozenset[str]:
    return present.intersection((*patch.after, *patch.needs))


def _cycle(waiting: dict[str, Patch]) -> CycleError:
    # Every blocked patch has a blocked predecessor, so walking backwards must reach one of them twice.
    path = [next(iter(waiting))]
    while path[-1] not in path[:-1]:
        path.append(min(_before(waiting[path[-1]], frozenset(waiting))))
    cycle = path[path.index(path[-1]) :][::-1]
    claims = " before ".join(f"{patch_id} ({waiting[patch_id].claimant})" for patch_id in cycle)
    return CycleError(
        f"no order satisfies these patches: {claims}; remove one `after` or `needs`",
        cycle=cycle,
    )
