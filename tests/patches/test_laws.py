"""Laws: whatever is done in whatever order, each `__dict__` ends as it began, by presence and identity."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import patches
from tests.helpers.declare import LAYERS, declare
from tests.helpers.fake_upstream import brittle
from tests.helpers.law_targets import LAW_OWNERS, LAW_TARGETS, replace_class, tags, write_tagged
from tests.helpers.snapshot import Snapshot

# HYPOTHESIS_PROFILE=nightly python -m pytest tests/patches/test_laws.py
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
EXAMPLES = {"quick": 60, "ci": 300, "nightly": 5000}[PROFILE]
STEPS = {"quick": 20, "ci": 20, "nightly": 40}[PROFILE]


class BodyError(Exception):
    pass


class VerifyError(Exception):
    pass


TARGETS = sorted(LAW_TARGETS)


def failing_verify() -> None:
    raise VerifyError


@contextmanager
def refusing_later(name: str) -> Iterator[Callable[[], None]]:
    """Gives a function that makes Fragile refuse to have its attribute `name` changed."""
    try:
        yield lambda: brittle.Brittle.refusing.add(name)
    finally:
        brittle.Brittle.refusing.clear()


@contextmanager
def refusing(name: str) -> Iterator[None]:
    with refusing_later(name) as refuse:
        refuse()
        yield


class Programs(RuleBasedStateMachine):
    """Random programs over every kind of target; the model is the set of ids that must be active."""

    patches_made: Bundle[patches.Patch] = Bundle("patches_made")

    def __init__(self) -> None:
        super().__init__()
        self.before = Snapshot(*LAW_OWNERS)
        self.open: list[patches.Transaction] = []
        self.count = 0

    @initialize(target=patches_made, at=st.sampled_from(TARGETS))
    def first(self, at: str) -> patches.Patch:
        return self._declare(at)

    @rule(target=patches_made, at=st.sampled_from(TARGETS))
    def declare(self, at: str) -> patches.Patch:
        return self._declare(at)

    def _declare(self, at: str, **fields: Any) -> patches.Patch:
        self.count += 1
        kind = LAW_TARGETS[at].fields.get("kind")
        special = {"class": replace_class, "setter": write_tagged}.get(kind)
        if special is not None:
            fields["wrapper"] = special(f"law{self.count}")
        return declare(f"law{self.count}", at, **LAW_TARGETS[at].fields, **fields)

    @rule(chosen=st.lists(patches_made, max_size=3))
    def enter(self, chosen: list[patches.Patch]) -> None:
        tx = patches.transaction(*chosen, reason="a law")
        tx.__enter__()
        self.open.append(tx)

    @rule(chosen=st.lists(patches_made, max_size=3), at=st.sampled_from(TARGETS), last=st.booleans())
    def fail_to_verify(self, chosen: list[patches.Patch], at: str, last: bool) -> None:
        """Fails after everything was applied; nothing of it may stay, and nothing else may go."""
        active = patches.active()
        bad = self._declare(at, verify=failing_verify)
        items = [*chosen, bad] if last else [bad, *chosen]
        with pytest.raises(patches.VerifyError):
            patches.transaction(*items, reason="a law").__enter__()
        assert patches.active() == active

    @rule(chosen=st.lists(patches_made, max_size=3))
    def fail_to_resolve(self, chosen: list[patches.Patch]) -> None:
        active, now = patches.active(), Snapshot(*LAW_OWNERS)
        bad = declare("law0", f"{LAYERS}:Base.gone")
        with pytest.raises(patches.IncompatibleError):
            patches.transaction(*chosen, bad, reason="a law").__enter__()
        assert patches.active() == active
        assert now.differences() == []

    @precondition(lambda self: self.open)
    @rule(data=st.data(), chosen=st.lists(patches_made, max_size=2))
    def savepoint(self, data: st.DataObject, chosen: list[patches.Patch]) -> None:
        tx = data.draw(st.sampled_from(self.open))
        active = patches.active()
        savepoint = tx.savepoint()
        tx.apply(*chosen)
        savepoint.rollback()
        assert patches.active() == active

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.open)).commit()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), raising=st.booleans())
    def leave(self, data: st.DataObject, raising: bool) -> None:
        """In any order, not only the innermost first."""
        tx = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        error = BodyError() if raising else None
        tx.__exit__(type(error) if error else None, error, None)

    @precondition(lambda self: patches.active())
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(patches.active()))
        patches.revert(chosen if data.draw(st.booleans()) else chosen.id)

    @precondition(lambda self: patches.active())
    @rule(data=st.data(), disable=st.booleans())
    def switch(self, data: st.DataObject, disable: bool) -> None:
        chosen = data.draw(st.sampled_from(patches.active()))
        (patches.disable if disable else patches.enable)(chosen)

    @rule(chosen=st.lists(patches_made, max_size=3), last=st.booleans())
    def fail_to_apply(self, chosen: list[patches.Patch], last: bool) -> None:
        active = patches.active()
        bad = declare("law0", f"{brittle.__name__}:Fragile.one")
        with refusing("one"), pytest.raises(patches.ApplyError, match="one is refused"):
            patches.transaction(*([*chosen, bad] if last else [bad, *chosen]), reason="a law").__enter__()
        assert patches.active() == active

    @rule(chosen=st.lists(patches_made, max_size=3))
    def fail_to_undo(self, chosen: list[patches.Patch]) -> None:
        """What could not be undone stays active, and can be undone later; all else is undone."""
        active = patches.active()
        bad = declare("law0", f"{brittle.__name__}:Fragile.one")
        tx = patches.transaction(bad, *chosen, reason="a law")
        with refusing_later("one") as refuse, pytest.raises(patches.UndoError), tx:
            refuse()
        assert patches.active() == [*active, tx.receipts[0]]
        patches.revert(tx.receipts[0])
        assert patches.active() == active

    @invariant()
    def what_runs_is_what_is_active(self) -> None:
        active: dict[str, set[str]] = {}
        for receipt in patches.active():
            if not receipt.disabled:
                active.setdefault(receipt.target, set()).add(receipt.id.removeprefix("fake."))
        for name, target in LAW_TARGETS.items():
            # A base that is patched as well shows through what a class inherits.
            assert tags(target.read()) == active.get(name, set()) | active.get(target.base, set())

    @invariant()
    def unpatched_places_are_as_they_were(self) -> None:
        patched = {LAW_TARGETS[receipt.target].differs for receipt in patches.active()}
        # All that is active at a value may be disabled: then what is there is what was there.
        enabled = {LAW_TARGETS[receipt.target].differs for receipt in patches.active() if not receipt.disabled}
        differing = set(self.before.differences())
        assert enabled <= differing <= patched

    def teardown(self) -> None:
        for tx in self.open:
            tx.__exit__(None, None, None)
        with suppress(patches.NotActiveError):
            patches.revert(*patches.active())
        try:
            assert self.before.differences() == []
            assert patches.active() == []
            assert len(patches.audit()) == 0
        finally:
            self.before.restore()


Programs.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPrograms = Programs.TestCase
