"""The ways in which others patch, interleaved with two transactions of ours in every order."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import wrapt

import patches
from tests.helpers import form_targets
from tests.helpers.form_targets import FORM_OWNERS, FORMS, OBJECT, Form, through
from tests.helpers.snapshot import Snapshot

Undo = Callable[[], None]
Idiom = Callable[[Any, str], Undo]


def around(owner: Any, name: str, saved: Callable[..., Any]) -> Any:
    """What a third party puts there: it calls what was found, and binds as that did."""
    kind = inspect.getattr_static(owner, name).__class__
    if kind is classmethod:
        return classmethod(lambda cls, *args, **kwargs: saved(*args, **kwargs))

    def function(*args: Any, **kwargs: Any) -> Any:
        return saved(*args, **kwargs)

    return staticmethod(function) if kind is staticmethod else function


def save_and_put_back(owner: Any, name: str) -> Undo:
    """The commonest: what was found by attribute access is assigned again."""
    saved = getattr(owner, name)
    setattr(owner, name, around(owner, name, saved))
    return lambda: setattr(owner, name, saved)


def save_raw_and_put_back(owner: Any, name: str) -> Undo:
    """As careful code does it: descriptors are kept as they are, and what was inherited is deleted."""
    held, inherited = vars(owner).get(name), name not in vars(owner)
    setattr(owner, name, around(owner, name, getattr(owner, name)))
    return lambda: delattr(owner, name) if inherited else setattr(owner, name, held)


def mock_object(owner: Any, name: str) -> Undo:
    patcher: Any = mock.patch.object(owner, name, around(owner, name, getattr(owner, name)))
    patcher.start()
    return patcher.stop  # type: ignore[no-any-return]


def monkey(owner: Any, name: str) -> Undo:
    patcher = pytest.MonkeyPatch()
    patcher.setattr(owner, name, around(owner, name, getattr(owner, name)))
    return patcher.undo


def wrapt_and_unwrap(owner: Any, name: str) -> Undo:
    held, inherited = vars(owner).get(name), name not in vars(owner)
    wrapt.wrap_function_wrapper(owner, name, lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs))
    return lambda: delattr(owner, name) if inherited else setattr(owner, name, held)


IDIOMS: dict[str, Idiom] = {
    each.__name__: each for each in (save_and_put_back, save_raw_and_put_back, mock_object, monkey, wrapt_and_unwrap)
}
TARGETS = {
    **{name: FORMS[name] for name in ("plain", "cached", "floor", "partial", "Base.method", "Derived.method")},
    # Through the class: who puts back what is read there makes it a method of instances.
    "Base.static": Form(path="Base.static", receiver=lambda: form_targets.Base),
    **{name: FORMS[name] for name in ("Base.of_class", "Base.later", "Point.scaled")},
}
# "a" opens our first transaction and "A" closes it, "t" is what the third party does and "T" its undo.
EVENTS = [
    "".join(order)
    for order in itertools.permutations("aAbBtT")
    if all(order.index(one) < order.index(one.upper()) for one in "abt") and order.index("a") < order.index("b")
]


def is_nested(order: str) -> bool:
    """Whether everything is undone last in, first out."""
    stack: list[str] = []
    for event in order:
        if event.islower():
            stack.append(event)
        elif stack.pop() != event.lower():
            return False
    return True


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    taken = Snapshot(*FORM_OWNERS)
    yield
    taken.restore()
    with suppress(patches.UndoError):
        patches.revert_all()


def owner_of(form: Form) -> Any:
    first, _, last = form.path.rpartition(".")
    return getattr(form_targets, first) if last != form.path else form_targets


class Play:
    """One order of events at one target, with what acts recorded."""

    def __init__(self, form: Form, idiom: Idiom) -> None:
        self.form, self.idiom = form, idiom
        self.acted: list[str] = []
        self.open: dict[str, patches.Transaction] = {}
        self.problems: list[BaseException] = []
        self.undo: Undo = lambda: None

    def run(self, order: str) -> None:
        for event in order:
            if event == "t":
                self.undo = self.idiom(owner_of(self.form), self.form.name)
            elif event == "T":
                self.undo()
            else:
                self._ours(event)

    def call(self) -> Any:
        """Call the target; `acted` then has the patches that the call went through."""
        self.acted.clear()
        result = through(self.form.read()(self.form.argument))
        return result, sorted(self.acted)

    def _ours(self, event: str) -> None:
        tag = event.lower()
        if event == tag:
            return self._enter(tag)
        tx = self.open.pop(tag, None)
        if tx is None:
            return None
        try:
            tx.__exit__(None, None, None)
        except* patches.PatchError as group:
            self.problems.append(group)
        return None

    def _enter(self, tag: str) -> None:
        def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            self.acted.append(tag)
            return wrapped(*args, **kwargs)

        patch = patches.Patch(id=f"fake.{tag}", target=self.form.target, wrapper=wrapper, reason="a test")
        tx = patches.transaction(patch, reason="a test")
        try:
            self.open[tag] = tx.__enter__()
        except (patches.OverwrittenError, patches.IncompatibleError):  # a third party is in the way
            assert tag == "b" or leaves_its_own(self.form.path, self.idiom.__name__)


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_undone_last_in_first_out_leaves_nothing(name: str, idiom: str) -> None:
    form, before = TARGETS[name], Snapshot(*FORM_OWNERS)
    stock = through(form.read()(form.argument))
    for order in filter(is_nested, EVENTS):
        play = Play(form, IDIOMS[idiom])
        play.run(order)
        assert (order, play.problems, len(patches.audit())) == (order, [], 0)
        inside_ours = any(order.index(one) < order.index("t") < order.index(one.upper()) for one in "ab")
        if inside_ours or not leaves_its_own(name, idiom):
            assert (order, before.differences()) == (order, [])
        before.restore()
        assert (order, *play.call()) == (order, stock, [])


def leaves_its_own(name: str, idiom: str) -> bool:
    """Whether a third party leaves a trace where there is none of ours: what it reads is not what the class holds."""
    of_its_own = name in ("Base.of_class", "Base.static") or name.startswith("Derived.")
    return of_its_own and idiom == "save_and_put_back"


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize("name", TARGETS)
def test_in_any_other_order_nothing_acts_and_all_can_be_cleared(name: str, idiom: str) -> None:
    form, before = TARGETS[name], Snapshot(*FORM_OWNERS)
    stock = through(form.read()(form.argument))
    for order in EVENTS:
        play = Play(form, IDIOMS[idiom])
        play.run(order)
        assert (order, *play.call()) == (order, stock, [])
        with suppress(patches.UndoError):
            patches.revert_all()
        rows = [row.target for row in patches.audit()]
        assert (order, rows) == (order, []), "a row that can never be cleared"
        if not leaves_its_own(name, idiom):
            assert (order, before.differences()) == (order, [])
        assert (order, *play.call()) == (order, stock, [])
        before.restore()


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize("name", TARGETS)
def test_while_open_each_patch_acts_once(name: str, idiom: str) -> None:
    """Also around and inside what a third party has put there properly."""
    form, before = TARGETS[name], Snapshot(*FORM_OWNERS)
    for order in ("a", "ta", "at", "atT", "abt", "abtT", "atTb", "tab"):
        play = Play(form, IDIOMS[idiom])
        play.run(order)
        assert (order, play.call()[1], play.problems) == (order, [*order.replace("t", "").replace("T", "")], [])
        on_top = order.endswith("t") and name not in ("Base.of_class", "Base.static")  # of which each read is new
        if on_top or not order.endswith("t"):
            assert (order, {row.state for row in patches.audit()}) == (order, {"buried" if on_top else "active"})
        left = order.replace("tT", "")
        play.run(left[::-1].upper())
        assert (order, play.problems) == (order, [])
        before.restore()


@pytest.mark.parametrize("name", ["method", "of_class", "static", "later"])
def test_what_is_saved_through_an_instance_and_put_back_there_is_theirs(name: str) -> None:
    form = Form(path=f"Base.{name}", receiver=form_targets.Base)
    stock = through(form.read()(3))
    one = form_targets.Base()
    before = Snapshot(*FORM_OWNERS)
    play = Play(form, save_and_put_back)
    play.run("a")
    saved = getattr(one, name)
    setattr(one, name, lambda x: saved(x + 0))
    assert through(getattr(one, name)(3)) == stock
    assert play.acted == ["a"]
    setattr(one, name, saved)
    play.run("A")
    assert (play.problems, before.differences()) == ([], [])
    play.acted.clear()
    assert through(getattr(one, name)(3)) == stock
    assert play.acted == []


def test_an_object_in_hand_is_patched_and_put_back() -> None:
    form, before = FORMS["OBJECT.method"], Snapshot(*FORM_OWNERS)
    play = Play(form, save_and_put_back)
    play.run("atTA")
    assert (play.problems, before.differences(), vars(OBJECT)) == ([], [], {})


@pytest.mark.parametrize("name", ["plain", "Base.method", "Base.of_class", "Base.static", "Derived.method"])
def test_what_is_around_a_patched_thing_is_not_called_a_replacement(name: str) -> None:
    """Whoever reads the audit learns that calls still go through the patch."""
    form, before = TARGETS[name], Snapshot(*FORM_OWNERS)
    play = Play(form, save_and_put_back)
    play.run("at")
    assert play.call()[1] == ["a"]
    assert [row.state for row in patches.audit()] == ["buried"]
    play.run("TA")
    assert (play.problems, before.differences()) == ([], [])


@pytest.mark.parametrize("name", ["plain", "Base.method", "Base.of_class", "Base.static", "Derived.method"])
def test_what_was_reverted_under_a_replacement_is_not_forgotten_while_somebody_keeps_it(name: str) -> None:
    """A mock that replaces our object keeps it, and puts it back in the end, however often we have undone it."""
    form, before = TARGETS[name], Snapshot(*FORM_OWNERS)
    play = Play(form, save_raw_and_put_back)
    play.run("a")
    patcher: Any = mock.patch.object(owner_of(form), form.name, new=staticmethod(str))
    patcher.start()
    with pytest.raises(patches.UndoError):
        patches.revert("fake.a")
    play.run("A")
    patcher.stop()
    assert len(patches.audit()) == 0
    assert before.differences() == []


# Items and variables -------------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {"first": object(), "key": object(), "last": object()}
VARIABLE = "IDIOMS_MODE"


THEIRS = "theirs"


def item_by_hand(mapping: Any, key: str) -> Undo:
    saved = mapping[key]
    mapping[key] = THEIRS
    return lambda: mapping.__setitem__(key, saved)


def item_by_monkey(mapping: Any, key: str) -> Undo:
    patcher = pytest.MonkeyPatch()
    patcher.setitem(mapping, key, THEIRS)
    return patcher.undo


def item_by_mock(mapping: Any, key: str) -> Undo:
    patcher: Any = mock.patch.dict(mapping, {key: THEIRS})
    patcher.start()
    return patcher.stop  # type: ignore[no-any-return]


ITEM_IDIOMS = {each.__name__: each for each in (item_by_hand, item_by_monkey, item_by_mock)}
MAPPINGS = {
    f"{__name__}:TABLE[key]": (TABLE, "key"),
    f"os:environ[{VARIABLE}]": (os.environ, VARIABLE),
}


class ItemPlay(Play):
    """One order of events at an item, whose content is replaced."""

    def __init__(self, target: str, idiom: Idiom, how: str) -> None:
        super().__init__(Form(path=target), idiom)
        self.how = how

    def run(self, order: str) -> None:
        mapping, key = MAPPINGS[self.form.path]
        for event in order:
            if event == "t":
                self.undo = self.idiom(mapping, key)
            elif event == "T":
                self.undo()
            else:
                self._ours(event)

    def _enter(self, tag: str) -> None:
        deed: Any = f"ours {tag}" if self.how == "replace" else lambda read, *_: f"ours {tag}"
        fields: Any = {"id": f"fake.{tag}", "kind": "value", "reason": "a test", self.how: deed}
        tx = patches.transaction(patches.Patch(target=self.form.path, **fields))
        with suppress(patches.OverwrittenError):  # a third party is in the way
            self.open[tag] = tx.__enter__()


@pytest.mark.parametrize("idiom", ITEM_IDIOMS)
@pytest.mark.parametrize("target", MAPPINGS)
@pytest.mark.parametrize("how", ["replace", "wrapper"])
def test_items_in_every_order(target: str, idiom: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last in, first out, it is exact; in any other order nothing of ours is left, and all can be cleared."""
    monkeypatch.setenv(VARIABLE, "stock")
    mapping, key = MAPPINGS[target]
    stock, before = dict(mapping), list(mapping)
    for order in EVENTS:
        play = ItemPlay(target, ITEM_IDIOMS[idiom], how)
        play.run(order)
        if is_nested(order):
            assert (order, dict(mapping) == stock, len(patches.audit()), play.problems) == (order, True, 0, [])
        for _ in range(2):
            with suppress(patches.UndoError):
                patches.revert_all()
        assert (order, len(patches.audit())) == (order, 0)
        left = mapping.get(key)
        mapping[key] = stock[key]
        assert (order, left) in ((order, stock[key]), (order, THEIRS))
        assert list(mapping) == before


def test_a_variable_is_told_by_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment makes a new string of each read."""
    monkeypatch.setenv(VARIABLE, "stock")
    play = ItemPlay(f"os:environ[{VARIABLE}]", item_by_hand, "wrapper")
    play.run("abA")
    assert (play.problems, os.environ[VARIABLE]) == ([], "ours b")
    play.run("B")
    assert (play.problems, os.environ[VARIABLE], patches.active()) == ([], "stock", [])
