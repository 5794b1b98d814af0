"""Targets other than what is called: values, items, defaults, classes, setters, attributes of objects."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import patches
from patches.errors import TargetError
from patches.target import MISSING, parse
from tests.helpers.declare import declare
from tests.helpers.fake_upstream import values
from tests.helpers.snapshot import Snapshot

VALUES = values.__name__
OWNERS = (
    values,
    values.ACTIVATIONS,
    values.ON_DEMAND,
    values.STEPS,
    values.resize,
    values.OPTIONS,
    *(values.Options, values.Box, values.SubBox, values.Elsewhere, values.ELSEWHERE),
)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[Snapshot]:
    taken = Snapshot(*OWNERS)
    yield taken
    active, differences = patches.active(), taken.differences()
    taken.restore()
    patches.revert(*active)
    assert active == []
    assert differences == []


@pytest.mark.parametrize(
    ("text", "key", "parameter"),
    [
        ("a:T[relu]", "relu", None),
        ("a:T['a[b]']", "a[b]", None),
        ("a:C.t[3]", 3, None),
        ("a:T['3']", "3", None),
        ("a:T[('a', 1)]", ("a", 1), None),
        ("a:f(x)", MISSING, "x"),
        ("a:C.f", MISSING, None),
    ],
)
def test_keys_and_parameters_are_parsed(text: str, key: object, parameter: str | None) -> None:
    target = parse(text)
    assert (target.key, target.parameter) == (key, parameter)
    assert parse(str(target)) == target


@pytest.mark.parametrize("text", ["a:T[]", "a:f()", "a:f(x)(y)", "a:f(1)", "a:f(x)[1]", "a:[x]"])
def test_other_suffixes_are_refused(text: str) -> None:
    with pytest.raises(TargetError, match="not of the form"):
        parse(text)


VALUE = {"kind": "value"}
PLACES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    f"{VALUES}:LIMIT": (VALUE, lambda: values.LIMIT),
    f"{VALUES}:Options.kinds": (VALUE, lambda: values.OPTIONS.kinds),
    f"{VALUES}:ACTIVATIONS[relu]": ({}, lambda: values.ACTIVATIONS["relu"](1)),
    f"{VALUES}:ACTIVATIONS[1]": (VALUE, lambda: values.ACTIVATIONS[1]),
    f"{VALUES}:STEPS[0]": (VALUE, lambda: values.STEPS[0]),
    f"{VALUES}:resize(size)": ({}, lambda: values.resize("x")[1]),
    f"{VALUES}:resize(mode)": ({}, lambda: values.resize("x")[2]),
    f"{VALUES}:resize(pad)": (VALUE, lambda: values.resize("x")[3]),
    f"{VALUES}:OPTIONS.level": (VALUE, lambda: values.OPTIONS.level),
    f"{VALUES}:OPTIONS.kinds": (VALUE, lambda: values.OPTIONS.kinds),
    f"{VALUES}:OPTIONS.callback": ({}, lambda: values.OPTIONS.callback(1)),
    f"{VALUES}:OPTIONS.describe": ({}, lambda: values.OPTIONS.describe(1)),
}


@pytest.mark.parametrize("target", PLACES)
def test_it_is_replaced_in_a_chain_and_restored_in_any_order(target: str, unchanged: Snapshot) -> None:
    fields, read = PLACES[target]
    stock = read()
    for order in itertools.permutations(range(3)):
        receipts = []
        for tag in "abc":
            with patches.transaction(declare(tag, target, **fields), reason="a test") as tx:
                tx.commit()
            receipts += tx.receipts
        left = ["a", "b", "c"]
        for position in order:
            expected = stock
            for tag in left:
                expected = (tag, expected)
            assert read() == expected
            patches.revert(receipts[position])
            left.remove("abc"[position])
        assert unchanged.differences() == []


def test_two_defaults_of_one_function_give_back_the_first_tuple_in_any_order(unchanged: Snapshot) -> None:
    size, mode = declare("s", f"{VALUES}:resize(size)"), declare("m", f"{VALUES}:resize(mode)")
    for first, second in ((size, mode), (mode, size)):
        with patches.transaction(size, mode, reason="a test") as tx:
            tx.commit()
        assert values.resize("x") == ("x", ("s", 10), ("m", "fast"), 0)
        patches.revert(first.id)
        patches.revert(second.id)
        assert unchanged.differences() == []


def test_a_default_is_found_under_a_patch_of_the_function() -> None:
    with patches.transaction(declare("f", f"{VALUES}:resize"), reason="a"):
        with patches.transaction(declare("d", f"{VALUES}:resize(size)"), reason="b"):
            assert values.resize("x") == ("f", ("x", ("d", 10), "fast", 0))
            assert [row.state for row in patches.audit()] == ["active", "active"]
        assert values.resize("x") == ("f", ("x", 10, "fast", 0))


def subclass(tag: str) -> Callable[..., type]:
    def wrapper(read: Callable[[], type], instance: None, args: Any, kwargs: Any) -> type:
        return type(f"Box{tag}", (read(),), {"tag": tag})

    return wrapper


def test_a_class_is_replaced_by_what_the_wrapper_makes_of_it_once() -> None:
    before = values.Box
    one, two = (declare(tag, f"{VALUES}:Box", kind="class", wrapper=subclass(tag)) for tag in ("one", "two"))
    with patches.transaction(one, reason="a"):
        first: Any = values.Box
        assert issubclass(first, before)
        assert values.Box(3).content == 3
        with patches.transaction(two, reason="b"):
            assert values.Box.__mro__[:3] == (values.Box, first, before)
        assert values.Box is first
    assert values.Box is before


def test_what_replaces_a_class_must_be_one() -> None:
    bad = declare("a", f"{VALUES}:Box", kind="class", wrapper=lambda *_: 3)
    with pytest.raises(patches.ApplyError, match="must return a class, and returned 3"):
        patches.transaction(bad, reason="a test").__enter__()


@pytest.mark.parametrize("cls", [values.Box, values.SubBox])
def test_a_setter_and_a_getter_are_patched_apart(cls: type[values.Box], unchanged: Snapshot) -> None:
    def double(write: Callable[[Any], None], instance: values.Box, args: tuple[Any], kwargs: Any) -> None:
        write(2 * args[0])

    target = f"{VALUES}:{cls.__name__}.content"
    box, other = cls(1), cls(1)
    writes = declare("w", target, kind="setter", wrapper=double)
    with patches.transaction(patches.on(writes, [box]), reason="a"):
        with patches.transaction(declare("r", target), reason="b"):
            box.content = other.content = 5
            assert (box.content, other.content) == (("r", 10), ("r", 5))
        box.content = 6
        assert box.content == 12
    box.content = 7
    assert box.content == 7
    assert unchanged.differences() == []


def test_a_setter_of_a_base_that_is_patched_later_shows_through() -> None:
    def double(write: Callable[[Any], None], instance: values.Box, args: tuple[Any], kwargs: Any) -> None:
        write(2 * args[0])

    sub, base = (declare(c, f"{VALUES}:{c}.content", id=f"fake.{c.lower()}", kind="setter", wrapper=double)
                 for c in ("SubBox", "Box"))  # fmt: skip
    box = values.SubBox(0)
    with patches.transaction(sub, reason="a"), patches.transaction(base, reason="b"):
        box.content = 1
        assert box.content == 4


def test_a_value_that_somebody_else_has_replaced_is_left_alone() -> None:
    with patches.transaction(declare("a", f"{VALUES}:LIMIT", kind="value"), reason="a test") as tx:
        tx.commit()
    values.LIMIT = 99
    with pytest.raises(patches.UndoError):
        patches.revert("fake.a")
    assert values.LIMIT == 99
    values.LIMIT = 3
    assert len(patches.audit()) == 0


def test_a_container_that_somebody_else_has_replaced_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with patches.transaction(declare("a", f"{VALUES}:STEPS[0]", kind="value"), reason="a test"):
        with monkeypatch.context() as context:
            context.setattr(values, "STEPS", ["fresh"])
            assert [row.state for row in patches.audit()] == ["overwritten"]
        assert [row.state for row in patches.audit()] == ["active"]


@pytest.mark.parametrize(
    ("path", "kind", "why"),
    [
        ("LIMIT", "auto", 'say kind="value"'),
        ("Options.kinds", "auto", 'say kind="value"'),
        ("Box", "auto", 'say kind="class"'),
        ("LIMIT", "class", "the patch says 'class'"),
        ("ACTIVATIONS[gone]", "auto", r"no item \['gone'\]"),
        ("STEPS[2]", "value", "no item \\[2\\]"),
        ("STEPS[-1]", "value", "no item"),
        ("STEPS[first]", "value", "no item"),
        ("ON_DEMAND[new]", "value", "no item"),
        ("FROZEN[a]", "value", "not a dictionary or list"),
        ("resize(image)", "auto", "with a default for 'image'"),
        ("Box(content)", "auto", "not a Python function with a default"),
        ("Box.content", "method", "its kind is 'property'"),
        ("ReadOnly.content", "setter", "without a setter"),
        ("Options.describe", "setter", "its kind is 'method'"),
        ("OPTIONS.doubled", "value", "it is a property of class 'Options'"),
        ("OPTIONS.gone", "value", "no attribute 'gone'"),
        ("OPTIONS.level", "attribute", "and this is no class"),
    ],
)
def test_what_cannot_be_patched_is_refused_with_the_reason(path: str, kind: str, why: str) -> None:
    with pytest.raises(patches.IncompatibleError, match=why):
        patches.transaction(declare("a", f"{VALUES}:{path}", kind=kind), reason="a test").__enter__()


@pytest.mark.parametrize(
    ("path", "kind", "why"),
    [
        ("Closed.run", "auto", "Guarded.__setattr__ does not let it be set: AttributeError"),
        ("Color.RED", "value", "does not let it be set"),
        ("ELSEWHERE.run", "auto", "Elsewhere.__setattr__ stores it elsewhere"),
    ],
)
def test_owners_that_refuse_are_found_before_anything_is_changed(path: str, kind: str, why: str) -> None:
    values.ELSEWHERE.stored.clear()
    good = declare("good", f"{VALUES}:LIMIT", kind="value", wrapper=lambda *_: pytest.fail("applied"))
    with pytest.raises(TargetError, match=why):
        patches.transaction(good, declare("a", f"{VALUES}:{path}", kind=kind), reason="a test").__enter__()


@pytest.mark.parametrize("target", ["builtins:int.real", "builtins:dict.get", "torch._C:TensorBase.add"])
def test_types_written_in_c_are_refused(target: str) -> None:
    pytest.importorskip(target.partition(":")[0])
    assert patches.verdict(declare("a", target)).kind == "incompatible"
    assert "immutable type" in patches.verdict(declare("a", target)).why


def test_a_value_has_no_instance_scope() -> None:
    with pytest.raises(patches.ScopeError, match="which all read alike"):
        patches.transaction(declare("a", f"{VALUES}:LIMIT", kind="value"), reason="a", on=[values.OPTIONS]).__enter__()
