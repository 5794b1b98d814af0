"""Laws: whatever is done in whatever order, each `__dict__` ends as it began, by presence and identity."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers
from tests.helpers.snapshot import Snapshot
from tests.patches.conftest import OWNERS

# HYPOTHESIS_PROFILE=nightly python -m pytest tests/patches/test_laws.py
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
EXAMPLES = {"quick": 60, "ci": 300, "nightly": 5000}[PROFILE]
STEPS = {"quick": 20, "ci": 20, "nightly": 40}[PROFILE]


class BodyError(Exception):
    pass


class VerifyError(Exception):
    pass


TARGETS: dict[str, dict[str, Any]] = {
    f"{FUNCTIONS}:scale": {},
    f"{FUNCTIONS}:lazy": {},
    f"{LAYERS}:Base.forward": {},
    f"{LAYERS}:Base.build": {},
    f"{LAYERS}:Base.add": {},
    f"{LAYERS}:Base.size": {},
    f"{LAYERS}:Derived.forward": {},
    f"{LAYERS}:Derived.size": {},
    f"{LAYERS}:Holder.weight": {"kind": "attribute"},
    f"{LAYERS}:Leaf.scale": {"kind": "attribute"},
}


def failing_verify() -> None:
    raise VerifyError


def read(target: str, instance: Any) -> Any:
    """What the target gives now, so that what is active can be seen in the tags around the result."""
    calls: dict[str, Callable[[], Any]] = {
        "scale": lambda: instance.scale if instance is not None else functions.scale(2),
        "lazy": lambda: functions.lazy(2),
        "forward": lambda: instance.forward(1),
        "build": lambda: type(instance).build(1),
        "add": lambda: instance.add(1, 2),
        "size": lambda: instance.size,
        "weight": lambda: instance.weight,
    }
    return calls[target.rpartition(":")[2].rpartition(".")[2]]()


def tags(result: Any) -> set[str]:
    found = set()
    while isinstance(result, tuple) and str(result[0]).startswith("law"):
        found.add(result[0])
        result = result[1]
    return found


INSTANCES: dict[str, Callable[[], Any]] = {
    "Base": layers.Base,
    "Derived": layers.Derived,
    "Holder": lambda: layers.Holder(1),
    "Leaf": lambda: layers.Leaf(1),
}


class Programs(RuleBasedStateMachine):
    """Random programs over every kind of target; the model is the set of ids that must be active."""

    patches_made: Bundle[patches.Patch] = Bundle("patches_made")

    def __init__(self) -> None:
        super().__init__()
        self.before = Snapshot(*OWNERS)
        self.open: list[patches.Transaction] = []
        self.count = 0

    @initialize(target=patches_made, at=st.sampled_from(sorted(TARGETS)))
    def first(self, at: str) -> patches.Patch:
        return self._declare(at)

    @rule(target=patches_made, at=st.sampled_from(sorted(TARGETS)), traced=st.booleans())
    def declare(self, at: str, traced: bool) -> patches.Patch:
        return self._declare(at, traced=traced)

    def _declare(self, at: str, **fields: Any) -> patches.Patch:
        self.count += 1
        return declare(f"law{self.count}", at, **TARGETS[at], **fields)

    @rule(chosen=st.lists(patches_made, max_size=3))
    def enter(self, chosen: list[patches.Patch]) -> None:
        tx = patches.transaction(*chosen, reason="a law")
        tx.__enter__()
        self.open.append(tx)

    @rule(chosen=st.lists(patches_made, max_size=3), at=st.sampled_from(sorted(TARGETS)), last=st.booleans())
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
        active, now = patches.active(), Snapshot(*OWNERS)
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

    @invariant()
    def what_runs_is_what_is_active(self) -> None:
        active: dict[str, set[str]] = {}
        for receipt in patches.active():
            active.setdefault(receipt.target, set()).add(receipt.id.removeprefix("fake."))
        for target in TARGETS:
            owner = target.rpartition(":")[2].partition(".")[0]
            instance = INSTANCES[owner]() if owner in INSTANCES else None
            # A base that is patched as well shows through what a class inherits.
            inherited = active.get(target.replace("Derived", "Base"), set()) if owner == "Derived" else set()
            assert tags(read(target, instance)) == active.get(target, set()) | inherited

    @invariant()
    def unpatched_places_are_as_they_were(self) -> None:
        patched = {receipt.target.replace(":", ".") for receipt in patches.active()}
        differing = {
            name if "." in name and name.startswith("tests") else f"{LAYERS}.{name}"
            for name in self.before.differences()
        }
        assert differing == patched

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
