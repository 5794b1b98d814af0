from __future__ import annotations

import functools
import importlib
import itertools
import types
from typing import Any

import pytest
import wrapt

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers
from tests.helpers.snapshot import Snapshot

SCALE = f"{FUNCTIONS}:scale"

pytestmark = pytest.mark.usefixtures("unchanged")


def call(name: str, cls: type = layers.Base) -> object:
    instance = cls()
    calls = {
        "forward": lambda: instance.forward(1),
        "build": lambda: (instance.build(1), cls.build(1)),
        "add": lambda: (instance.add(1, 2), cls.add(1, 2)),
        "size": lambda: instance.size,
    }
    return calls[name]()


PLAIN = {"forward": ("{}", 1), "build": ("{}", 1), "add": 3, "size": 7}


def expected(name: str, cls: type, *tags: str) -> object:
    plain: object = (cls.__name__, 1) if name in ("forward", "build") else PLAIN[name]
    for tag in tags:
        plain = (tag, plain)
    return (plain, plain) if name in ("build", "add") else plain


@pytest.mark.parametrize("cls", [layers.Base, layers.Derived])
@pytest.mark.parametrize("name", ["forward", "build", "add", "size"])
def test_every_kind_of_target_is_wrapped_and_restored(name: str, cls: type, unchanged: Snapshot) -> None:
    target = f"{LAYERS}:{cls.__name__}.{name}"
    one, two = declare("one", target), declare("two", target)
    with patches.transaction(one, two, reason="a test"):
        assert call(name, cls) == expected(name, cls, "one", "two")
        if cls is layers.Derived:
            assert call(name, layers.Base) == expected(name, layers.Base)
    assert call(name, cls) == expected(name, cls)
    assert unchanged.differences() == []


def test_a_function_is_wrapped_and_looks_like_the_original() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test"):
        assert functions.scale(2, by=3) == ("a", 6)
        assert functions.scale.__name__ == "scale"
        assert functions.scale.__wrapped__.__doc__ == functions.scale.__doc__
        assert type(functions.scale) is types.FunctionType


def test_arguments_arrive_as_in_wrapt() -> None:
    seen = []

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append((instance, args, kwargs))
        return wrapped(*args, **kwargs)

    base = layers.Base()
    targets = [SCALE, *(f"{LAYERS}:Base.{name}" for name in ("forward", "build", "add", "size"))]
    ids = [f"fake.p{number}" for number in range(len(targets))]
    made = [declare("x", target, id=patch_id, wrapper=wrapper) for patch_id, target in zip(ids, targets, strict=True)]
    with patches.transaction(*made, reason="a test"):
        (
            functions.scale(1, by=2),
            base.forward(x=1),
            layers.Base.forward(base, 1),
            base.build(1),
            base.add(1, y=2),
            base.size,
        )
    assert seen == [
        (None, (1,), {"by": 2}),
        (base, (), {"x": 1}),
        (base, (1,), {}),
        (layers.Base, (1,), {}),
        (None, (1,), {"y": 2}),
        (base, (), {}),
    ]


def test_methods_that_python_calls_itself() -> None:
    calls = []

    def noting(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append((type(instance).__name__, args))
        return wrapped(*args, **kwargs)

    made = [
        declare("x", f"{LAYERS}:Made.{name}", id=f"fake.{name.strip('_')}", wrapper=noting)
        for name in ("__new__", "__init__", "__call__")
    ]
    taken = Snapshot(layers.Made)
    with patches.transaction(*made, reason="a test"):
        assert layers.Made(1)(2) == 3
    assert calls == [("NoneType", (layers.Made, 1)), ("Made", (1,)), ("Made", (2,))]
    assert layers.Made(1)(2) == 3
    assert len(calls) == 3
    assert taken.differences() == []


def test_the_setter_of_a_property_stays() -> None:
    base = layers.Base()
    with patches.transaction(declare("a", f"{LAYERS}:Base.size"), reason="a test"):
        base.size = 3
    assert vars(base) == {"asked": 3}


def test_an_attribute_that_a_module_makes_on_demand_is_gone_again() -> None:
    with patches.transaction(declare("a", f"{FUNCTIONS}:lazy"), reason="a test"):
        assert functions.lazy(2) == ("a", 4)
    assert "lazy" not in vars(functions)
    assert functions.lazy(2) == 4


def test_a_base_that_is_patched_later_shows_through_an_inherited_target() -> None:
    derived, base = declare("derived", f"{LAYERS}:Derived.forward"), declare("base", f"{LAYERS}:Base.forward")
    with patches.transaction(derived, reason="a"):
        with patches.transaction(base, reason="b"):
            assert layers.Derived().forward(1) == ("derived", ("base", ("Derived", 1)))
        assert layers.Derived().forward(1) == ("derived", ("Derived", 1))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_of_one_slot_are_undone_in_any_order(order: tuple[int, ...], unchanged: Snapshot) -> None:
    tags = ["a", "b", "c"]
    receipts = []
    for tag in tags:
        with patches.transaction(declare(tag, SCALE), reason="a test") as tx:
            tx.commit()
        receipts += tx.receipts
    left = list(tags)
    for position in order:
        patches.revert(receipts[position])
        left.remove(tags[position])
        result: object = 4
        for tag in left:
            result = (tag, result)
        assert functions.scale(2) == result
    assert unchanged.differences() == []


def test_a_patch_that_is_active_twice_runs_once_and_stays_until_the_last_is_undone() -> None:
    patch = declare("a", SCALE)
    with patches.transaction(patch, reason="one"):
        with patches.transaction(patch, reason="two"):
            assert functions.scale(2) == ("a", 4)
        assert functions.scale(2) == ("a", 4)
    assert functions.scale(2) == 4


def bury(how: str) -> None:
    ours = functions.scale

    @functools.wraps(ours)
    def wraps(*args: Any, **kwargs: Any) -> Any:
        return "foreign", ours(*args, **kwargs)

    def closure(*args: Any) -> Any:
        return "foreign", ours(*args)

    def default(*args: Any, _original: Any = ours) -> Any:
        return "foreign", _original(*args)

    def proxy(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return "foreign", wrapped(*args, **kwargs)

    foreign = {
        "wraps": wraps,
        "closure": closure,
        "default": default,
        "wrapt": wrapt.FunctionWrapper(ours, proxy),
        "partial": functools.partial(ours),
    }
    functions.scale = foreign[how]


@pytest.mark.parametrize("how", ["wraps", "closure", "default", "wrapt", "partial"])
def test_a_foreign_object_around_ours_is_left_there_and_ours_lets_calls_through(how: str, unchanged: Snapshot) -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.commit()
    ours = functions.scale
    bury(how)
    foreign = functions.scale
    assert [row.state for row in patches.audit()] == ["buried"]
    with pytest.raises(patches.UndoError) as caught:
        patches.revert("fake.a")
    (error,) = caught.value.exceptions
    assert isinstance(error, patches.OverwrittenError)
    assert (error.state, error.target, error.found) == ("buried", SCALE, foreign)
    assert functions.scale is foreign
    assert functions.scale(2) == (4 if how == "partial" else ("foreign", 4))
    assert patches.active() == []
    assert [(row.id, row.state) for row in patches.audit()] == [("fake.a", "buried")]
    with pytest.raises(patches.UndoError):
        patches.revert("fake.a")
    # Once the foreign object is gone, so is ours.
    functions.scale = ours
    assert len(patches.audit()) == 0
    assert unchanged.differences() == []


def test_what_somebody_else_has_put_there_is_never_removed(unchanged: Snapshot) -> None:
    original = functions.scale
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.commit()
    functions.scale = len  # type: ignore[assignment]
    assert [row.state for row in patches.audit()] == ["overwritten"]
    with pytest.raises(patches.UndoError) as caught:
        patches.revert(*tx.receipts)
    assert caught.value.exceptions[0].state == "overwritten"
    assert functions.scale is len
    assert [row.state for row in patches.audit()] == ["overwritten"]
    functions.scale = original
    assert len(patches.audit()) == 0


def test_if_somebody_else_restored_the_original_there_is_nothing_to_undo(unchanged: Snapshot) -> None:
    original = functions.scale
    with patches.transaction(declare("a", SCALE), reason="a test"):
        functions.scale = original
        assert [row.state for row in patches.audit()] == ["overwritten"]
    assert unchanged.differences() == []
    assert len(patches.audit()) == 0


def test_applying_to_a_slot_that_somebody_else_has_changed_is_refused() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test"):
        ours = functions.scale
        functions.scale = len  # type: ignore[assignment]
        with pytest.raises(patches.OverwrittenError, match="revert the patches"):
            patches.transaction(declare("b", SCALE), reason="a test").__enter__()
        assert functions.scale is len
        functions.scale = ours


def test_a_foreign_patch_that_was_there_before_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        foreign = wrapt.FunctionWrapper(functions.scale, lambda wrapped, instance, args, kwargs: "foreign")
        context.setattr(functions, "scale", foreign)
        with patches.transaction(declare("a", SCALE), reason="a test"):
            assert functions.scale(2) == ("a", "foreign")
        assert functions.scale is foreign


def test_a_copy_of_the_patched_object_lets_calls_through_after_undoing() -> None:
    for _ in range(2):
        with patches.transaction(declare("a", SCALE), reason="a test"):
            copied = functions.scale
            assert copied(2) == ("a", 4)
        assert copied(2) == 4


def test_a_reloaded_module_is_seen_and_keeps_its_new_definitions() -> None:
    module = importlib.import_module("tests.helpers.fake_upstream.reloadable")
    function, method = (
        declare("f", f"{module.__name__}:compute"),
        declare("m", f"{module.__name__}:Thing.run"),
    )
    with patches.transaction(function, method, reason="a test"):
        assert (module.compute(), module.Thing().run()) == (("f", 1), ("m", 2))
        importlib.reload(module)
        assert [row.state for row in patches.audit()] == ["reloaded", "reloaded"]
        fresh = module.compute
    assert module.compute is fresh
    assert (module.compute(), module.Thing().run()) == (1, 2)
    assert len(patches.audit()) == 0


def test_two_wrappers_from_one_factory_are_not_taken_for_a_reload(unchanged: Snapshot) -> None:
    original = functions.scale
    bury("wraps")
    first = functions.scale
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.commit()
    ours = functions.scale
    bury("wraps")
    with pytest.raises(patches.UndoError):
        patches.revert("fake.a")
    assert [row.state for row in patches.audit()] == ["buried"]
    functions.scale = ours
    assert len(patches.audit()) == 0
    assert functions.scale is first
    functions.scale = original
