"""Slots: the object installed at one place, and exact restoration of the original."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from .compose import compose, is_traced
from .copies import Copies
from .errors import OverwrittenError, TargetError
from .ledger import Receipt, State
from .link import Link
from .order import in_order
from .overlay import is_redefinition, leads_to
from .target import Kind, Place, is_orphaned

__all__ = ["Slot"]


class Slot:
    """One place with the chain of active links, recomposed whenever a link is added or removed.

    Not thread-safe by itself.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.links: tuple[Link, ...] = ()
        # Objects of ours that may be at the place. Two while one is being replaced by the other, so that after an
        # interrupt at any point neither looks foreign.
        self._ours: tuple[object, ...] = ()
        self.copies = Copies(place)
        self._spec = _spec(place)

    @property
    def live(self) -> Any:
        """The object at the place now."""
        return self.place.cell.read()

    @property
    def is_traced(self) -> bool:
        """Whether torch.compile sees the installed object."""
        return is_traced(self.place, [link.patch for link in self.links])

    @property
    def condition(self) -> State:
        """ACTIVE, BURIED, RELOADED or OVERWRITTEN, judged by the object at the place now."""
        if is_orphaned(self.place):
            return State.RELOADED
        if self._is_intact():
            return State.ACTIVE
        if leads_to(self.live, self._ours):
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
            counter, everyone = link.counter, link.everyone
            link.hold(receipt)
            if link.counter is not counter or (self._is_value and link.everyone is not everyone):
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

    @property
    def _is_value(self) -> bool:
        return self.place.kind in (Kind.VALUE, Kind.CLASS)

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
            self.copies.restore(self.place.own)
        # Restored by somebody else, or redefined by a reload: nothing of ours is left to remove.
        return self.live is self.place.own or self._is_redefined() or self._is_absent()

    def _is_absent(self) -> bool:
        """Whether nothing is left to undo: a value's patches were disabled when somebody replaced it, and still are."""
        wanted = any(link.everyone for link in self.links)
        return self._is_value and not wanted and all(ours is self.place.own for ours in self._ours)

    def _is_redefined(self) -> bool:
        """Whether a reload has put a new definition here, judged by the function or class, or else by the module's
        new spec, since a decorated function, for example, does not show its source.
        """
        return is_redefinition(self.live, self.place) or _spec(self.place) is not self._spec

    def _is_intact(self) -> bool:
        live = self.live
        return any(live is ours for ours in self._ours) or (live is self.place.own and not self._ours)

    def _install(self) -> None:
        wanted = compose(self.place, self.links) if self.links else self.place.own
        self._ours = (*self._ours, wanted)
        self._write(wanted)
        self._follow(wanted)
        self._ours = (wanted,)

    def _follow(self, installed: object) -> None:
        if not any(link.patch.aliases == "rewrite" for link in self.links):
            self.copies.restore(installed)
            self.copies.note(installed)
            return
        # The module that declares a patch may hold a copy of the original in order to call it.
        self.copies.rewrite(installed, spared=frozenset(link.patch.module for link in self.links))

    def _write(self, value: object) -> None:
        if self.live is value:
            return
        self.place.cell.write(value)
        if self.live is not value:
            why = f"setting it had no effect; expected {value!r} there, found {self.live!r}"
            raise TargetError(f"cannot patch {self.place.target!r}: {why}", target=self.place.target, why=why)

    def _overwritten(self, advice: str) -> OverwrittenError:
        state, found = self.condition, self.live
        return OverwrittenError(
            f"{self.place.target!r} is {state}: expected what was installed, found {found!r}; {advice}",
            target=self.place.target,
            state=state.value,
            found=found,
        )


def _spec(place: Place) -> object:
    return vars(place.owner).get("__spec__") if isinstance(place.owner, ModuleType) else None
