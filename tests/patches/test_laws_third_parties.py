"""Laws where others patch, overwrite, restore and reload as well: nothing of theirs is lost, and the audit names
whatever of ours could not be taken away.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import patches
from patches.activation import ACTIVATIONS
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers, reloadable, values
from tests.helpers.snapshot import Snapshot
from tests.patches.test_laws import EXAMPLES, STEPS

MISSING = object()
RELOADABLE = reloadable.__name__
# (owner, name) of what third parties change too, by target.
SHARED: dict[str, tuple[Any, str]] = {
    f"{FUNCTIONS}:scale": (functions, "scale"),
    f"{LAYERS}:Base.forward": (layers.Base, "forward"),
    f"{LAYERS}:Derived.forward": (layers.Derived, "forward"),
    f"{values.__name__}:LIMIT": (values, "LIMIT"),
    f"{RELOADABLE}:compute": (reloadable, "compute"),
}
OWN = [*SHARED, f"{LAYERS}:Base.add", f"{RELOADABLE}:Thing.run", f"{values.__name__}:resize(size)"]
KINDS = {f"{values.__name__}:LIMIT": "value"}
OWNERS = (functions, layers.Base, layers.Derived, values, values.resize)


def own(at: str) -> Any:
    owner, name = SHARED[at]
    return vars(owner).get(name, MISSING)


class Foreign:
    """What a third party has put somewhere, and what it found there."""

    def __init__(self, at: str, *, around: bool) -> None:
        self.at = at
        self.found = own(at)
        self.installed = self._around(self.found) if around and callable(self.found) else self._instead()
        setattr(*SHARED[at], self.installed)

    def restore(self) -> bool:
        """As a careful third party does: not where somebody else has been since."""
        if own(self.at) is not self.installed:
            return False
        if self.found is MISSING:
            delattr(*SHARED[self.at])
        else:
            setattr(*SHARED[self.at], self.found)
        return True

    @staticmethod
    def _around(found: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(found)
        def foreign(*args: Any, **kwargs: Any) -> Any:
            return found(*args, **kwargs)

        return foreign

    @staticmethod
    def _instead() -> Callable[..., Any]:
        return lambda *args, **kwargs: "foreign"


class Disturbed(RuleBasedStateMachine):
    """Random programs of ours and of others."""

    patches_made: Bundle[patches.Patch] = Bundle("patches_made")

    def __init__(self) -> None:
        super().__init__()
        importlib.reload(reloadable)
        self.before = Snapshot(*OWNERS)
        self.reloaded = Snapshot(reloadable)
        self.foreign: list[Foreign] = []
        self.open: list[patches.Transaction] = []
        self.count = 0

    def _declare(self, at: str) -> patches.Patch:
        self.count += 1
        return declare(f"law{self.count}", at, kind=KINDS.get(at, "auto"))

    @initialize(target=patches_made, at=st.sampled_from(OWN))
    def first(self, at: str) -> patches.Patch:
        return self._declare(at)

    @rule(target=patches_made, at=st.sampled_from(OWN))
    def declare(self, at: str) -> patches.Patch:
        return self._declare(at)

    @rule(chosen=st.lists(patches_made, min_size=1, max_size=3))
    def enter(self, chosen: list[patches.Patch]) -> None:
        """Refused, with nothing changed, where somebody else has been at a slot of ours."""
        active, now = patches.active(), Snapshot(*OWNERS, reloadable)
        tx = patches.transaction(*chosen, reason="a law")
        try:
            tx.__enter__()
        except (patches.OverwrittenError, patches.IncompatibleError):
            assert patches.active() == active
            assert now.differences() == []
        else:
            self.open.append(tx)

    @rule(at=st.sampled_from(sorted(SHARED)), around=st.booleans())
    def patch_as_a_third_party(self, at: str, around: bool) -> None:
        self.foreign.append(Foreign(at, around=around))

    @precondition(lambda self: self.foreign)
    @rule(data=st.data())
    def restore_as_a_third_party(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.foreign))
        if chosen.restore():
            self.foreign.remove(chosen)

    @rule()
    def reload(self) -> None:
        importlib.reload(reloadable)
        self.reloaded = Snapshot(reloadable)
        self.foreign = [foreign for foreign in self.foreign if not foreign.at.startswith(RELOADABLE)]

    @precondition(lambda self: self.open)
    @rule(data=st.data(), raising=st.booleans())
    def leave(self, data: st.DataObject, raising: bool) -> None:
        tx = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        foreign = {place.at: own(place.at) for place in self.foreign}
        error = KeyError("body") if raising else None
        with suppress(patches.UndoError):
            tx.__exit__(type(error) if error else None, error, None)
        for at, installed in foreign.items():
            self._is_still_there(at, installed)

    @precondition(lambda self: patches.active())
    @rule(data=st.data(), disable=st.booleans())
    def switch(self, data: st.DataObject, disable: bool) -> None:
        chosen = data.draw(st.sampled_from(patches.active()))
        with suppress(patches.UndoError):
            (patches.disable if disable else patches.enable)(chosen)

    def _is_still_there(self, at: str, installed: object) -> None:
        theirs = [foreign.installed for foreign in self.foreign if foreign.at == at]
        if any(installed is one for one in theirs):
            assert own(at) is installed, "what somebody else has put there is never taken away"

    @invariant()
    def the_audit_can_be_taken(self) -> None:
        listed = {row.id for row in patches.audit()}
        assert {receipt.id for receipt in patches.active()} <= listed

    def teardown(self) -> None:
        for tx in self.open:
            with suppress(patches.UndoError):
                tx.__exit__(None, None, None)
        with suppress(patches.UndoError):
            patches.revert(*patches.active())
        try:
            self._nothing_of_ours_acts()
            self._what_is_left_is_named()
            self._all_is_well_once_others_are_gone()
        finally:
            for owner in (self.before, self.reloaded):
                owner.restore()
            ACTIVATIONS._left_behind.clear()  # so that a failing example fails alone

    def _nothing_of_ours_acts(self) -> None:
        assert patches.active() == []
        for result in (functions.scale(2), layers.Base().forward(1), layers.Derived().forward(1), reloadable.compute()):
            assert not str(result).startswith("('law")

    def _what_is_left_is_named(self) -> None:
        """Where no third party is, nothing differs; where ours is under theirs, the audit says so."""
        theirs = {f"{SHARED[foreign.at][0].__name__}.{SHARED[foreign.at][1]}" for foreign in self.foreign}
        assert {*self.before.differences(), *self.reloaded.differences()} <= theirs
        for row in patches.audit():
            assert row.state in ("buried", "overwritten", "reloaded")
            assert row.target in {foreign.at for foreign in self.foreign}

    def _all_is_well_once_others_are_gone(self) -> None:
        for foreign in reversed(self.foreign):
            foreign.restore()
            patches.audit()  # takes away what of ours is in reach again, so that they find theirs in turn
        assert len(patches.audit()) == 0
        assert [*self.before.differences(), *self.reloaded.differences()] == []


Disturbed.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestDisturbed = Disturbed.TestCase
