"""Laws over every form and kind, with third parties that undo in order and out of it: what is not disturbed ends as it
began, by identity and order; where it is, nothing of ours acts, and the audit can be cleared.
"""

from __future__ import annotations

import collections
import gc
import os
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import patches
from tests.helpers import form_targets
from tests.helpers.form_targets import FORM_OWNERS, FORMS, Form, through
from tests.helpers.snapshot import Snapshot
from tests.patches.test_idioms import IDIOMS, leaves_its_own, owner_of
from tests.patches.test_laws import EXAMPLES, STEPS

ABSENT = object()
PACKAGE = str(Path(patches.__file__).parent)
LIB: Any = types.ModuleType("law_lib")
LIB.LIMIT, LIB.GONE, LIB.LAST = 3, [4], 5
LIB.TABLE = {"first": 1, "second": 2, "third": 3}
LIB.BELOW = {"key": "below"}
LIB.LAYERS = collections.ChainMap({}, LIB.BELOW)
sys.modules["law_lib"] = LIB
VARIABLE = "LAW_LIB_MODE"

CALLED = {
    name: FORMS[name]
    for name in ("plain", "defaulted", "coroutine", "generator", "cached", "floor", "partial", "adder",
                 "Base.of_class", "Derived.method", "Derived.later", "Point.scaled")
}  # fmt: skip
CALLED["Base.static"] = Form(path="Base.static", receiver=lambda: form_targets.Base)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A place whose content is not called."""

    target: str
    kind: str
    read: Callable[[], Any]


STORED = {
    stored.target: stored
    for stored in (
        Stored(target="law_lib:LIMIT", kind="value", read=lambda: vars(LIB).get("LIMIT", ABSENT)),
        Stored(target="law_lib:GONE", kind="delete", read=lambda: vars(LIB).get("GONE", ABSENT)),
        Stored(target="law_lib:NEW", kind="add", read=lambda: vars(LIB).get("NEW", ABSENT)),
        Stored(target="law_lib:TABLE[first]", kind="value", read=lambda: LIB.TABLE["first"]),
        Stored(target="law_lib:TABLE[second]", kind="delete", read=lambda: LIB.TABLE.get("second", ABSENT)),
        Stored(target="law_lib:TABLE[new]", kind="add", read=lambda: LIB.TABLE.get("new", ABSENT)),
        Stored(target="law_lib:LAYERS[key]", kind="value", read=lambda: LIB.LAYERS["key"]),
        Stored(target=f"os:environ[{VARIABLE}]", kind="add", read=lambda: os.environ.get(VARIABLE, ABSENT)),
    )
}
STOCK = {target: stored.read() for target, stored in STORED.items()}
PLACES = [*CALLED, *STORED]
OWNERS = (*FORM_OWNERS, LIB, LIB.TABLE, LIB.BELOW, LIB.LAYERS.maps[0])


@dataclass(eq=False)
class Made:
    """A patch of ours."""

    place: str
    how: str
    tag: str
    patch: patches.Patch


@dataclass(eq=False)
class Theirs:
    """What a third party has done at a place, and its undo."""

    place: str
    undo: Callable[[], None]
    idiom: str


@dataclass(eq=False)
class Open:
    """A transaction of ours that is open."""

    tx: patches.Transaction
    made: dict[Made, patches.Receipt]


class Forms(RuleBasedStateMachine):
    """Random programs; `stack` has what is at each place, in order of arrival."""

    made: Bundle[Made] = Bundle("made")

    def __init__(self) -> None:
        super().__init__()
        self.before = Snapshot(*OWNERS)
        self.acted: list[str] = []
        self.count = 0
        self.open: list[Open] = []
        self.stack: dict[str, list[Made | Theirs]] = {place: [] for place in PLACES}
        self.receipts: dict[Made, patches.Receipt] = {}
        self.disturbed: set[str] = set()

    def _make(self, place: str, how: str) -> Made:
        self.count += 1
        tag = f"law{self.count}"
        target = CALLED[place].target if place in CALLED else place
        fields: dict[str, Any] = {"id": f"fake.{tag}", "target": target, "reason": "a law"}
        if place in STORED:
            fields["kind"] = STORED[place].kind
        if fields.get("kind") == "delete":
            return Made(place, "delete", tag, patches.Patch(**fields))
        if fields.get("kind") == "add" and how == "wrapper":
            how = "replace"
        return Made(place, how, tag, patches.Patch(**fields, **{how: self._deed(place, how, tag)}))

    def _deed(self, place: str, how: str, tag: str) -> Any:
        def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            self.acted.append(tag)
            return wrapped(*args, **kwargs)

        def instead(*args: Any, **kwargs: Any) -> Any:
            self.acted.append(tag)
            return tag

        if place in STORED:
            return {"wrapper": lambda read, *_: (tag, read()), "replace": tag, "factory": lambda: tag}[how]
        return {"wrapper": wrapper, "replace": instead, "factory": lambda: instead}[how]

    @initialize(target=made, place=st.sampled_from(PLACES), how=st.sampled_from(["wrapper", "replace", "factory"]))
    def first(self, place: str, how: str) -> Made:
        return self._make(place, how)

    @rule(target=made, place=st.sampled_from(PLACES), how=st.sampled_from(["wrapper", "replace", "factory"]))
    def declare(self, place: str, how: str) -> Made:
        return self._make(place, how)

    @rule(chosen=st.lists(made, min_size=1, max_size=3))
    def enter(self, chosen: list[Made]) -> None:
        """Refused, with nothing changed, only where somebody else has been, or what is added is there."""
        chosen = [one for one in dict.fromkeys(chosen) if one not in self.receipts]
        if not chosen:
            return
        active, now = patches.active(), Snapshot(*OWNERS)
        tx = patches.transaction(*(one.patch for one in chosen))
        try:
            tx.__enter__()
        except patches.PatchError:
            assert any(self._is_shared(one.place) or one.patch.kind in ("add", "delete") for one in chosen)
            assert (patches.active(), now.differences()) == (active, [])
            return
        by_patch = {receipt.patch: receipt for receipt in tx.receipts}
        self.open.append(Open(tx, {one: by_patch[one.patch] for one in chosen}))
        self.receipts |= self.open[-1].made
        for one in chosen:
            self.stack[one.place].append(one)

    def _is_shared(self, place: str) -> bool:
        return place in self.disturbed or any(isinstance(one, Theirs) for one in self.stack[place])

    def _gone(self, one: Made | Theirs) -> None:
        """Note that something is undone, and whether that disturbs what a third party found or will put back."""
        stack = self.stack[one.place]
        if stack[-1] is not one and any(isinstance(other, Theirs) for other in stack):
            self.disturbed.add(one.place)
        stack.remove(one)
        if isinstance(one, Made):
            del self.receipts[one]

    def _all_gone(self, opened: Open) -> None:
        for one, receipt in reversed(opened.made.items()):
            if self.receipts.get(one) is receipt:
                self._gone(one)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), raising=st.booleans())
    def leave(self, data: st.DataObject, raising: bool) -> None:
        opened = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self._leave(opened, KeyError("body") if raising else None)

    def _leave(self, opened: Open, error: BaseException | None = None) -> None:
        self._all_gone(opened)
        try:
            opened.tx.__exit__(type(error) if error else None, error, None)
        except patches.UndoError:
            assert any(self._is_shared(one.place) for one in opened.made)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """An open transaction that nobody has any more undoes itself."""
        opened = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        if any(self._is_shared(one.place) for one in opened.made):  # its errors would have nobody to go to
            self._leave(opened)
            return
        self._all_gone(opened)
        del opened
        gc.collect(0)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).tx.commit()

    @precondition(lambda self: self.receipts)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(list(self.receipts)))
        receipt, shared = self.receipts[one], self._is_shared(one.place)
        self._gone(one)
        try:
            patches.revert(receipt)
        except patches.UndoError:
            assert shared

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), disable=st.booleans())
    def switch(self, data: st.DataObject, disable: bool) -> None:
        one = data.draw(st.sampled_from(list(self.receipts)))
        (patches.disable if disable else patches.enable)(self.receipts[one])

    @rule(place=st.sampled_from(sorted(CALLED)), idiom=st.sampled_from(sorted(IDIOMS)))
    def patch_as_a_third_party(self, place: str, idiom: str) -> None:
        form = CALLED[place]
        self.stack[place].append(Theirs(place, IDIOMS[idiom](owner_of(form), form.name), idiom))

    @rule(data=st.data(), in_order=st.booleans())
    def restore_as_a_third_party(self, data: st.DataObject, in_order: bool) -> None:
        theirs = [one for stack in self.stack.values() for one in stack if isinstance(one, Theirs)]
        theirs = [one for one in theirs if not in_order or self.stack[one.place][-1] is one]
        if theirs:
            self._restore(data.draw(st.sampled_from(theirs)))

    def _restore(self, one: Theirs) -> None:
        below = self.stack[one.place][: self.stack[one.place].index(one)]
        self._gone(one)
        with suppress(AttributeError):  # somebody has deleted what they want to delete
            one.undo()
        if leaves_its_own(one.place, one.idiom) and not any(isinstance(other, Made) for other in below):
            self.disturbed.add(one.place)

    @invariant()
    def what_is_read_is_what_is_active(self) -> None:
        for place, stored in STORED.items():
            expected = STOCK[place]
            for one in self._enabled(place):
                expected = {"wrapper": (one.tag, expected), "delete": ABSENT}.get(one.how, one.tag)
            assert (place, stored.read()) == (place, expected)

    @invariant()
    def what_runs_is_what_is_active(self) -> None:
        for place in CALLED:
            if self._is_shared(place):
                continue
            expected = []
            for one in reversed(self._enabled(place)):
                expected.append(one.tag)
                if one.how != "wrapper":
                    break
            assert (place, self._called(place)) == (place, expected)

    def _enabled(self, place: str) -> list[Made]:
        return [one for one in self.stack[place] if isinstance(one, Made) and not self.receipts[one].disabled]

    def _called(self, place: str) -> list[str]:
        self.acted.clear()
        through(CALLED[place].read()(CALLED[place].argument))
        return self.acted.copy()

    @invariant()
    def the_audit_lists_what_is_active(self) -> None:
        listed = [row.id for row in patches.audit() if row.state != "reverted"]
        assert {receipt.id for receipt in self.receipts.values()} <= set(listed)

    def teardown(self) -> None:
        for opened in reversed(self.open):
            self._leave(opened)
        for one in [one for stack in self.stack.values() for one in reversed(stack)]:
            if isinstance(one, Theirs):
                self._restore(one)
        for _ in range(2):  # the first says what was overwritten, the second clears it
            with suppress(patches.UndoError):
                patches.revert_all()
        try:
            self._nothing_of_ours_is_left()
        finally:
            self.before.restore()
            with suppress(patches.UndoError):
                patches.revert_all()

    def _nothing_of_ours_is_left(self) -> None:
        assert patches.active() == []
        around = {row.target for row in patches.audit() if row.state == "buried"}  # by what others have left there
        assert [row.target for row in patches.audit() if row.target not in around] == []
        assert around <= {f"{form_targets.__name__}:{place}" for place in self.disturbed if place in CALLED}
        allowed = {f"{owner_of(CALLED[place]).__name__}.{CALLED[place].name}" for place in self.disturbed}
        owners = {name.rpartition(".")[0] for name in allowed}
        left = self.before.differences()
        assert (sorted(allowed), [one for one in left if one not in allowed and one.split(":")[0] not in owners]) == (
            sorted(allowed),
            [],
        )
        assert {target: stored.read() for target, stored in STORED.items()} == STOCK
        for place, form in CALLED.items():
            assert (place, self._called(place)) == (place, [])
            assert (place, is_ours(vars(owner_of(form)).get(form.name))) == (place, False), "left without a row"


def is_ours(held: Any) -> bool:
    """Whether something is made by this registry, and not merely around what is."""
    bare = held.__func__ if type(held) in (classmethod, staticmethod, types.MethodType) else held
    code = getattr(bare, "__code__", None) if type(bare) is types.FunctionType else None
    return type(bare).__module__.startswith("patches.") or (code is not None and PACKAGE in code.co_filename)


Forms.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestForms = Forms.TestCase
