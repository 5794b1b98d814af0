"""Slots: the object installed at one place for a chain of patches, and exact restoration of the original."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, Final

from .copies import Copies
from .errors import ConflictError, CycleError, OverwrittenError, TargetError
from .forms import Form, Link, core
from .ledger import Receipt, State
from .patch import Patch
from .target import MISSING, STORED, Place, owner_now, put_back

__all__ = ["Slot", "in_order", "refuse_conflicts"]

_MAX_DEPTH: Final = 8
_REFERENCES: Final = ("__wrapped__", "__func__", "fget", "fset", "fdel")


class Slot:
    """One place with the chain of active links, recomposed whenever a link is added or removed.

    Not thread-safe by itself.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._is_value = place.kind in STORED
        self.links: tuple[Link, ...] = ()
        # Objects of ours that may be at the place. Two while one is being replaced by the other, so that after an
        # interrupt at any point neither looks foreign.
        self._ours: tuple[object, ...] = ()
        self.copies = Copies(place)
        self._form = Form(place)
        self._past: list[weakref.ref[Any]] = []
        self._spec = _spec(place)

    @property
    def live(self) -> Any:
        """The object at the place now."""
        return self.place.read()

    def condition(self, is_ours: Callable[[object], bool]) -> State:
        """ACTIVE, BURIED, RELOADED or OVERWRITTEN, judged by the object at the place now.

        `is_ours` tells whether an object, the owner that the target leads to now, was put there by a patch of ours.
        """
        owner = owner_now(self.place.target)
        if owner is not self.place.owner and not is_ours(owner):
            redefined = owner is MISSING or is_redefinition(owner, self.place.owner) or self._is_redefined()
            return State.RELOADED if redefined else State.OVERWRITTEN
        if self._is_intact():
            return State.ACTIVE
        if self._leads_to_ours():
            return State.BURIED
        return State.RELOADED if self._is_redefined() else State.OVERWRITTEN

    def refuse_overwritten(self) -> None:
        """Raise OverwrittenError if somebody else has changed the place since we installed an object."""
        if self.links and not self._is_intact():
            raise self._overwritten("revert the patches that are active there, then apply again")

    def add(self, receipt: Receipt) -> None:
        """Add `receipt` to its patch's link, a new one if needed, and install the recomposed object."""
        link = next((link for link in self.links if link.patch is receipt.patch), None)
        if link is not None:
            calls, everyone = link.calls, link.everyone
            link.hold(receipt)
            if link.calls is not calls or (self._is_value and link.everyone is not everyone):
                self._install()  # or it is composed as it was
            return
        link = Link(receipt.patch)
        link.hold(receipt)
        by_id = {other.patch.id: other for other in (*self.links, link)}
        self.links = tuple(by_id[key] for key in in_order(other.patch for other in by_id.values()))
        self._install()

    def refresh(self) -> None:
        """Update the place after receipts were disabled or enabled.

        Callables consult their links on each call. A value is replaced; raises OverwrittenError if somebody else
        has replaced it.
        """
        for link in self.links:
            link.refresh()
        self._refresh_value()

    def _refresh_value(self) -> None:
        if self._is_value and not self.settle():
            raise self._overwritten("it was left as found")

    def remove(self, receipt: Receipt) -> None:
        """Undo the change that `receipt` made here, if any.

        Raises OverwrittenError if somebody else has changed the place since. It is then left as found, and our
        object, wherever it is, passes calls through without effect.
        """
        held = next((link for link in self.links if link.drop(receipt)), None)
        if held:  # by another receipt too, which may be disabled
            self._refresh_value()
            return
        self.links = tuple(link for link in self.links if link)
        if not self.settle():
            raise self._overwritten("it was left as found; what was installed lets every call through")

    def settle(self) -> bool:
        """Install the object that the links require; returns False if a foreign object is in the way."""
        if self._is_intact():
            self._install()
            return True
        if not self.links:
            self._form.empty()
            self.copies.restore(self.place.own)
        # Restored by somebody else, or redefined by a reload: nothing of ours is left to remove.
        if self.live is self.place.own or self._is_redefined() or self._is_absent():
            return True
        return not self.links and not self._is_value and not self._all_ours() and self._is_below()

    def _is_below(self) -> bool:
        """Whether somebody has undone what they did before us: what is there is what our original was made from."""
        return self.live is MISSING or leads_to(self.place.own, [self.live, core(self.live)])

    def is_over(self) -> bool:
        """Whether an emptied slot may be forgotten by whoever asks for it: nothing of ours is there, and it is not kept
        by somebody who has yet to put it back, as far as can be seen.
        """
        seems_over = not self._leads_to_ours() and (self._is_value or self._is_below())
        return not self._all_ours() or seems_over

    def _leads_to_ours(self) -> bool:
        ours = self._all_ours()
        return leads_to(self.live, [*ours, *map(core, ours)])

    def let_go(self) -> None:
        """Keep what was installed by weak references only, once nothing is installed any more."""
        self._form = Form(self.place)
        for ours in self._ours:
            try:
                self._past.append(weakref.ref(core(ours)))  # not every descriptor can be referenced weakly
            except TypeError:  # a value: whoever has it may put it back at any time
                continue
            self._ours = tuple(other for other in self._ours if other is not ours)

    def _all_ours(self) -> list[object]:
        return [*self._ours, *(ours for ref in self._past if (ours := ref()) is not None)]

    def _is_absent(self) -> bool:
        """Whether nothing is left to undo: a value's patches were disabled when somebody replaced it, and still are."""
        wanted = any(link.everyone for link in self.links)
        return self._is_value and not wanted and not self._past and all(ours is self.place.own for ours in self._ours)

    def _is_redefined(self) -> bool:
        """Whether a reload has put a new definition here, judged by the function or class, or else by the module's
        new spec, since a decorated function, for example, does not show its source.
        """
        return is_redefinition(self.live, self.place.own) or _spec(self.place) is not self._spec

    def _is_intact(self) -> bool:
        live = self.live
        if live is self.place.own and not self._ours:
            return True
        bound = not self._is_value and live is not self.place.own
        return any(live is ours or (bound and core(live) is core(ours)) for ours in self._all_ours())

    def _install(self) -> None:
        wanted = self._form.over(self.links) if self.links else self.place.own
        self._ours = (*self._ours, wanted)
        self._write(wanted)
        if not self.links:
            self._form.empty()
        self._follow(wanted)
        self._ours = (wanted,)

    def _follow(self, installed: object) -> None:
        if not any(link.patch.aliases == "rewrite" for link in self.links):
            self.copies.restore(installed)
            self.copies.note(installed)
            return
        self.copies.rewrite(installed, spared=frozenset().union(*(link.patch.spared() for link in self.links)))

    def _write(self, value: object) -> None:
        before = self.live
        if before is value:
            return
        target = str(self.place.target)
        self.place.write(value)
        if self.live is not value:
            if self.place.target.is_attribute:
                put_back(self.place, before)
            why = f"setting it had no effect; expected {value!r} there, found {self.live!r}"
            raise TargetError(f"cannot patch {target!r}: {why}", target=target, why=why)

    def _overwritten(self, advice: str) -> OverwrittenError:
        state, found, target = self.condition(lambda _: False), self.live, str(self.place.target)
        return OverwrittenError(
            f"{target!r} is {state}: expected what was installed, found {found!r}; {advice}",
            target=target,
            state=state.value,
            found=found,
        )


def _spec(place: Place) -> object:
    """The spec of the target's module, which every reload replaces."""
    return getattr(sys.modules.get(place.target.module), "__spec__", None)


# Order ----------------------------------------------------------------------------------------------------------------


def in_order(patches: Iterable[Patch]) -> list[str]:
    """Sort the ids by the patches' `after` constraints, otherwise as given. Raises CycleError."""
    waiting = {patch.id: patch for patch in patches}
    ordered: list[str] = []
    while waiting:
        ready = next((key for key in waiting if waiting.keys().isdisjoint(_before(waiting[key]))), None)
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
                f"two patches have the id {patch.id!r}: {other.claimant} and {patch.claimant}; use one, or, if the "
                f"second is the first declared again, call patches.revert({patch.id!r}) before it is applied",
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


def _before(patch: Patch) -> set[str]:
    return {*patch.after, *patch.needs}


def _cycle(waiting: dict[str, Patch]) -> CycleError:
    # Every blocked patch has a blocked predecessor, so walking backwards must reach one of them twice.
    path = [next(iter(waiting))]
    while path[-1] not in path[:-1]:
        path.append(min(waiting.keys() & _before(waiting[path[-1]])))
    cycle = tuple(path[path.index(path[-1]) :][::-1])
    claims = " before ".join(f"{patch_id} ({waiting[patch_id].claimant})" for patch_id in cycle)
    return CycleError(f"no order satisfies these patches: {claims}; remove one `after` or `needs`", cycle=cycle)


# Foreign objects ------------------------------------------------------------------------------------------------------


def leads_to(found: object, wanted: Sequence[object]) -> bool:
    """Whether `found` calls, or at least refers to, one of `wanted`.

    Follows `__wrapped__`, bound and static methods, properties, partials, and references of a function: closure,
    defaults, globals that its code names.
    """
    seen: set[int] = set()
    frontier = [found]
    for _ in range(_MAX_DEPTH):
        if any(value is goal for value in frontier for goal in wanted):
            return True
        seen.update(map(id, frontier))
        frontier = [value for source in frontier for value in _referred(source) if id(value) not in seen]
    return False


def _referred(value: object) -> Iterator[object]:
    yield from (linked for name in _REFERENCES if (linked := getattr(value, name, None)) is not None)
    if isinstance(value, functools.partial):
        yield value.func
    if isinstance(value, type):
        yield from value.__bases__
    # `type`, not isinstance: a wrapt proxy imitates a function, but only its `__wrapped__` is relevant.
    if type(value) is FunctionType:
        yield from _referred_by_function(value)


def _referred_by_function(function: FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    known = function.__globals__
    yield from (known[name] for name in function.__code__.co_names if name in known)


def is_redefinition(found: Any, original: Any) -> bool:
    """Whether `found` is the original module, function or class, redefined from the same file by a reload."""
    if found is original:
        return False
    if isinstance(found, type) and isinstance(original, type):
        return (found.__module__, found.__qualname__) == (original.__module__, original.__qualname__)
    if type(found) is not FunctionType or type(original) is not FunctionType:
        return isinstance(found, ModuleType) and isinstance(original, ModuleType)
    if "<locals>" in found.__code__.co_qualname:  # made by a function, which may make several with equal names
        return False
    now, before = ((each.__module__, each.__qualname__, each.__code__.co_filename) for each in (found, original))
    return now == before
