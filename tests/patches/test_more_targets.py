"""Adding and deleting, objects in hand, alternatives, replacements and factories; counts; lifetimes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import functools
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare, tagging
from tests.helpers.fake_upstream import functions, layers, values
from tests.helpers.snapshot import Snapshot

SCALE, FORWARD = f"{FUNCTIONS}:scale", f"{LAYERS}:Base.forward"
VALUES = values.__name__
VARIABLE = "FAKE_UPSTREAM_MODE"
OWNERS = (values, values.ACTIVATIONS, values.STEPS, values.Options, values.OPTIONS, values.Box, layers.Base.table)

pytestmark = pytest.mark.usefixtures("unchanged")


@pytest.fixture(autouse=True)
def unchanged_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    taken = Snapshot(*OWNERS)
    yield
    differences = taken.differences()
    taken.restore()
    assert differences == []
    assert VARIABLE not in os.environ


def made(target: Any, **fields: Any) -> patches.Patch:
    """A patch without a wrapper."""
    return patches.Patch(**{"id": "fake.a", "target": target, "reason": "a test", **fields})


def refused(patch: patches.Patch, match: str) -> None:
    with pytest.raises(patches.IncompatibleError, match=match):
        patches.transaction(patch).__enter__()


# Adding --------------------------------------------------------------------------------------------------------------

ABSENT: dict[str, Callable[[], Any]] = {
    f"{FUNCTIONS}:added": lambda: vars(functions)["added"],
    f"{LAYERS}:Base.added": lambda: vars(layers.Base)["added"],
    f"{VALUES}:OPTIONS.added": lambda: vars(values.OPTIONS)["added"],
    f"{VALUES}:ACTIVATIONS[added]": lambda: values.ACTIVATIONS["added"],
    f"{LAYERS}:Base.table[added]": lambda: layers.Base.table["added"],
    f"os:environ[{VARIABLE}]": lambda: os.environ[VARIABLE],
}


@pytest.mark.parametrize("target", ABSENT)
@pytest.mark.parametrize("how", ["replace", "factory"])
def test_what_is_not_there_is_added_and_taken_away(target: str, how: str) -> None:
    read = ABSENT[target]
    patch = made(target, kind="add", **{how: "new" if how == "replace" else lambda: "new"})
    with patches.transaction(patch):
        assert read() == "new"
        assert [(row.target.replace("'", ""), row.state) for row in patches.audit()] == [(target, "active")]
    with pytest.raises(KeyError):
        read()


def test_an_added_method_is_bound_and_inherited() -> None:
    patch = made(f"{LAYERS}:Base.doubled", kind="add", replace=lambda self, x: (self.forward(x), 2 * x))
    with patches.transaction(patch):
        assert layers.Derived().doubled(2) == (("Derived", 2), 4)  # type: ignore[attr-defined]
    assert not hasattr(layers.Derived, "doubled")


def test_an_added_descriptor_is_told_its_name() -> None:
    patch = made(f"{LAYERS}:Base.lazy", kind="add", replace=functools.cached_property(lambda self: [7]))
    with patches.transaction(patch):
        base = layers.Base()
        assert base.lazy is base.lazy  # type: ignore[attr-defined]
        assert vars(base) == {"lazy": [7]}


@pytest.mark.parametrize(
    ("target", "there"),
    [(SCALE, "scale"), (FORWARD, "forward"), (f"{VALUES}:ACTIVATIONS[relu]", "relu"), ("os:environ[PATH]", "PATH")],
)
def test_what_is_there_is_not_added(target: str, there: str) -> None:
    refused(made(target, kind="add", replace="new"), there)


def test_what_somebody_else_has_put_over_an_addition_is_left() -> None:
    with pytest.raises(patches.UndoError), patches.transaction(made(f"{FUNCTIONS}:added", kind="add", replace=1)):
        functions.added = 2  # type: ignore[attr-defined]
    assert functions.added == 2  # type: ignore[attr-defined]
    del functions.added  # type: ignore[attr-defined]
    assert len(patches.audit()) == 0


def test_an_addition_that_somebody_else_has_taken_away_is_undone() -> None:
    added = made(f"{FUNCTIONS}:added", kind="add", replace=1)
    with contextlib.suppress(patches.UndoError), patches.transaction(added):
        del functions.added  # type: ignore[attr-defined]
    assert len(patches.audit()) == 0


def test_what_was_added_can_be_patched_in_turn() -> None:
    addition = made(f"{FUNCTIONS}:added", kind="add", replace=lambda x: x)
    with patches.transaction(addition):
        with patches.transaction(declare("b", f"{FUNCTIONS}:added"), reason="a test"):
            assert functions.added(1) == ("b", 1)  # type: ignore[attr-defined]
        assert functions.added(1) == 1  # type: ignore[attr-defined]


# Deleting ------------------------------------------------------------------------------------------------------------


class Removable:
    def method(self) -> None:
        """Be removed."""


PRESENT: dict[str, Any] = {
    f"{VALUES}:LIMIT": vars(values),
    f"{__name__}:Removable.method": Removable.__dict__,
    f"{VALUES}:OPTIONS.level": vars(values.OPTIONS),
    f"{VALUES}:ACTIVATIONS[relu]": values.ACTIVATIONS,
    f"{VALUES}:ACTIVATIONS[1]": values.ACTIVATIONS,
}


@pytest.mark.parametrize("target", PRESENT)
def test_what_is_there_is_deleted_and_put_back(target: str) -> None:
    holder, before = PRESENT[target], dict(PRESENT[target])
    with patches.transaction(made(target, kind="delete")):
        assert set(before) - set(holder) == {
            key for key in before if str(key) in target.rsplit(":", 1)[1].rsplit(".", maxsplit=1)[-1]
        }
        assert [(row.target.replace("'", ""), row.state) for row in patches.audit()] == [(target, "active")]
    assert all(holder[key] is value for key, value in before.items())
    assert len(holder) == len(before)


# Python has no way to put an attribute of a class back where it was: only those of a dictionary.
@pytest.mark.parametrize("target", [target for target in PRESENT if "Removable" not in target])
def test_what_was_deleted_is_put_back_where_it_was(target: str) -> None:
    holder, before = PRESENT[target], list(PRESENT[target])
    with patches.transaction(made(target, kind="delete")):
        pass
    order = list(holder)
    for key in before:  # so that one failing test does not fail those after it
        holder[key] = holder.pop(key)
    assert order == before


def test_an_environment_variable_is_replaced_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "old")
    target = f"os:environ[{VARIABLE}]"
    read = [sys.executable, "-c", f"import os; print(os.environ.get({VARIABLE!r}))"]
    with patches.transaction(made(target, kind="value", replace="new")):
        assert subprocess.run(read, check=True, capture_output=True, text=True).stdout == "new\n"
    with patches.transaction(made(target, kind="delete")):
        assert VARIABLE not in os.environ
        assert subprocess.run(read, check=True, capture_output=True, text=True).stdout == "None\n"
    assert os.environ[VARIABLE] == "old"
    monkeypatch.undo()


@pytest.mark.parametrize("target", [f"{FUNCTIONS}:gone", f"{VALUES}:ACTIVATIONS[gone]", f"os:environ[{VARIABLE}]"])
def test_what_is_not_there_is_not_deleted(target: str) -> None:
    refused(made(target, kind="delete"), "gone|MODE")


def test_what_somebody_else_has_put_in_place_of_what_was_deleted_is_left() -> None:
    box = values.Box(1)
    with pytest.raises(patches.UndoError), patches.transaction(made(patches.at(box, "_content"), kind="delete")):
        box._content = 2
    assert box.content == 2
    with contextlib.suppress(patches.UndoError):
        patches.revert_all()
    assert box.content == 2
    assert len(patches.audit()) == 0


# An object in hand ---------------------------------------------------------------------------------------------------


def test_an_object_in_hand_is_patched_and_no_other() -> None:
    one, other = layers.Base(), layers.Base()
    with patches.transaction(declare("a", patches.at(one, "forward")), reason="a test"):
        assert one.forward(1) == ("a", ("Base", 1))
        assert other.forward(1) == ("Base", 1)
        assert len(patches.audit()) == 1
        assert "Base" in patches.audit()[0].target
        assert "forward" in patches.audit()[0].target
    assert one.forward(1) == ("Base", 1)
    assert vars(one) == {}


@pytest.mark.parametrize(
    ("holder", "name"),
    [(functions, "scale"), (layers.Base, "add"), (layers.Derived, "build"), (values.OPTIONS, "describe")],
)
def test_modules_and_classes_in_hand(holder: Any, name: str) -> None:
    before, arguments = Snapshot(holder), {"scale": (1,), "add": (1, 2), "build": (1,), "describe": (1,)}[name]
    stock = getattr(holder, name)(*arguments)
    with patches.transaction(declare("a", patches.at(holder, name)), reason="a test"):
        assert getattr(holder, name)(*arguments) == ("a", stock)
    assert before.differences() == []


@pytest.mark.parametrize("name", ["build", "add"])
def test_a_method_of_the_class_is_patched_on_an_object_in_hand(name: str) -> None:
    one = layers.Derived()
    call: Callable[[Any], Any] = (lambda it: it.build(1)) if name == "build" else (lambda it: it.add(1, 2))
    stock = call(one)
    with patches.transaction(declare("a", patches.at(one, name))):
        assert call(one) == ("a", stock)
        assert call(layers.Derived()) == stock == call(layers.Derived)
        assert call(copy.deepcopy(one)) == ("a", stock)
    assert vars(one) == {}


def test_an_object_in_hand_and_a_path_to_it_are_one_place() -> None:
    with patches.transaction(declare("a", SCALE), declare("b", patches.at(functions, "scale")), reason="a test") as tx:
        tx.commit()
    assert functions.scale(2) == ("b", ("a", 4))
    patches.revert(tx.receipts[0])
    assert functions.scale(2) == ("b", 4)
    patches.revert_all()


@pytest.mark.parametrize(("kind", "given"), [("value", {"replace": 9}), ("add", {"replace": 9}), ("delete", {})])
def test_attributes_of_an_object_in_hand(kind: str, given: dict[str, Any]) -> None:
    box = values.Box(1)
    name = "more" if kind == "add" else "_content"
    before = dict(vars(box))
    with patches.transaction(made(patches.at(box, name), kind=kind, **given)):
        assert vars(box).get(name) == given.get("replace")
    assert vars(box) == before


def test_an_object_in_hand_is_not_kept_alive_once_it_is_undone() -> None:
    one = layers.Base()
    with patches.transaction(declare("a", patches.at(one, "forward")), reason="a test"):
        pass
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


def test_an_object_in_hand_copies_while_it_is_patched() -> None:
    one = layers.Unhashable(3)
    with patches.transaction(declare("a", patches.at(one, "to")), reason="a test"):
        for copied in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert copied == one
            assert copied.to("cpu") in ("cpu", ("a", "cpu"))
    assert copy.deepcopy(one).to("cpu") == "cpu"


# Alternatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["no_such_module:f", f"{FUNCTIONS}:renamed", f"{LAYERS}:Gone.forward"])
def test_the_first_target_that_resolves_is_patched(first: str) -> None:
    with patches.transaction(declare("a", (first, SCALE, FORWARD)), reason="a test") as tx:
        assert functions.scale(2) == ("a", 4)
        assert layers.Base().forward(1) == ("Base", 1)
        assert tx.receipts[0].target == patches.audit()[0].target == SCALE


def test_where_no_target_resolves_all_are_named() -> None:
    refused(declare("a", ("no_such_module:f", f"{FUNCTIONS}:renamed")), r"no_such_module.*renamed")


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(patches.DefinitionError, match="target"):
        declare("a", ())


def test_an_optional_patch_is_skipped_where_its_target_is_absent() -> None:
    absent = declare("a", (f"{FUNCTIONS}:gone", "no_such_module:f"), optional=True)
    with patches.transaction(absent, declare("b", SCALE, optional=True), reason="a test") as tx:
        assert functions.scale(2) == ("b", 4)
        assert [receipt.id for receipt in tx.skipped] == ["fake.a"]
        assert "gone" in tx.skipped[0].verdict.why


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("missing", [{"target": f"{FUNCTIONS}:gone"}, {"target": "no_such_module:f"},
                                     {"target": SCALE, "requires": {"no-such-distribution": ""}}])  # fmt: skip
def test_an_optional_patch_of_what_is_not_installed_is_skipped_too(missing: dict[str, Any], force: bool) -> None:
    with patches.transaction(declare("a", optional=True, **missing), declare("b", SCALE), force=force) as tx:
        assert functions.scale(2) == ("b", 4)
        assert [receipt.id for receipt in tx.skipped] == ["fake.a"]


def test_a_misspelt_module_gets_the_target_back_and_a_suggestion() -> None:
    refused(declare("a", "jsn:dumps"), "'jsn:dumps'.*did you mean 'json:dumps'")


@pytest.mark.parametrize("text", ["json:dumps()", "json:TABLE["])
def test_no_suggestion_is_of_the_wrong_form(text: str) -> None:
    with pytest.raises(patches.DefinitionError, match="not of the form") as caught:
        declare("a", text)
    assert "did you mean" not in str(caught.value)


def test_a_fault_of_an_optional_patch_is_an_error_all_the_same() -> None:
    patch = declare("a", SCALE, optional=True, signature="(other)")
    with pytest.raises(patches.DriftError):
        patches.transaction(patch, reason="a test").__enter__()


# Replacing -----------------------------------------------------------------------------------------------------------


def thrice(x: int, *, by: int = 3) -> int:
    return x * by


@pytest.mark.parametrize("how", ["replace", "factory"])
def test_a_function_replaces_another(how: str) -> None:
    given = thrice if how == "replace" else lambda: thrice
    with patches.transaction(made(SCALE, **{how: given})):
        assert functions.scale(2) == 6
        assert functions.scale(2, by=5) == 10
        assert functions.scale.__name__ in ("scale", "thrice")
        assert pickle.loads(pickle.dumps(functions.scale))(2) in (4, 6)
    assert functions.scale(2) == 4


REPLACEMENTS: dict[str, tuple[Callable[..., Any], Callable[[], Any], Any]] = {
    "Base.forward": (lambda self, x: ("new", type(self).__name__, x), lambda: layers.Derived().forward(1),
                     ("new", "Derived", 1)),
    "Derived.forward": (lambda self, x: ("new", super(layers.Derived, self).forward(x)),
                        lambda: layers.Derived().forward(1), ("new", ("Derived", 1))),
    "Base.build": (lambda cls, x: ("new", cls.__name__, x), lambda: (layers.Derived.build(1), layers.Base().build(1)),
                   (("new", "Derived", 1), ("new", "Base", 1))),
    "Base.add": (lambda x, y: ("new", x, y), lambda: (layers.Base.add(1, 2), layers.Derived().add(1, 2)),
                 (("new", 1, 2), ("new", 1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("path", REPLACEMENTS)
def test_a_method_is_replaced_by_a_function_with_its_own_signature(path: str) -> None:
    function, call, expected = REPLACEMENTS[path]
    stock = call()
    with patches.transaction(made(f"{LAYERS}:{path}", replace=function)):
        assert call() == expected
    assert call() == stock


def test_a_replacement_is_limited_to_instances() -> None:
    one, other = layers.Base(), layers.Base()
    with patches.transaction(patches.on(made(FORWARD, replace=lambda self, x: ("new", x)), [one])):
        assert (one.forward(1), other.forward(1)) == (("new", 1), ("Base", 1))


def test_wrappers_go_around_a_replacement_whichever_comes_first() -> None:
    replacing = made(SCALE, replace=thrice)
    with patches.transaction(replacing), patches.transaction(declare("b", SCALE), reason="a test"):
        assert functions.scale(2) == ("b", 6)
    with patches.transaction(replacing):
        assert functions.scale(2) == 6


@pytest.mark.parametrize(
    "function",
    [lambda: 1, lambda x: x, lambda x, by: x, lambda y, *, by=2: y, lambda x, *, by=2, more: x],
    ids=["nothing", "no by", "by position", "renamed", "one more"],
)
def test_a_function_with_another_signature_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(patches.PatchError, match="signature"):
        patches.transaction(made(SCALE, replace=function)).__enter__()
    assert functions.scale(2) == 4


@pytest.mark.parametrize("function", [lambda x, *, by=2, more=None: x * by, lambda *args, **kwargs: 8])
def test_a_function_that_takes_all_the_calls_is_accepted(function: Callable[..., Any]) -> None:
    with patches.transaction(made(SCALE, replace=function)):
        assert functions.scale(2, by=4) == 8


def test_a_value_is_replaced() -> None:
    with patches.transaction(made(f"{VALUES}:LIMIT", kind="value", replace=(1, 2))):
        assert values.LIMIT == (1, 2)
    for nothing in (None, False, 0):
        with patches.transaction(made(f"{VALUES}:LIMIT", kind="value", replace=nothing)):
            assert values.LIMIT is nothing


@pytest.mark.parametrize("how", ["replace", "factory"])
def test_a_class_is_replaced_by_a_subclass(how: str) -> None:
    class Better(values.Box):
        better = True

    stock, given = values.Box, {how: Better if how == "replace" else lambda: Better}
    with patches.transaction(made(f"{VALUES}:Box", kind="class", **given)):
        assert values.Box is Better
        assert isinstance(values.Box(1), stock)
    assert values.Box is stock


class Unrelated:
    pass


@pytest.mark.parametrize("other", [Unrelated, lambda: None, 3])
def test_a_class_is_not_replaced_by_anything_else(other: Any) -> None:
    with pytest.raises(patches.PatchError, match="class"):
        patches.transaction(made(f"{VALUES}:Box", kind="class", replace=other)).__enter__()


def test_a_factory_runs_when_the_patch_is_applied_and_each_time() -> None:
    ran: list[int] = []

    def factory() -> Callable[..., Any]:
        ran.append(len(ran))
        return lambda x, *, by=2: ("made", len(ran))

    patch = made(SCALE, factory=factory)
    patches.plan(patch)
    assert ran == []
    for times in (1, 2):
        with patches.transaction(patch):
            assert functions.scale(1) == functions.scale(1) == ("made", times)
    assert len(ran) == 2


def test_a_factory_that_fails_leaves_nothing() -> None:
    def factory() -> Any:
        raise OSError("no compiler")

    with pytest.raises(patches.ApplyError, match="no compiler"):
        patches.transaction(declare("b", FORWARD), made(SCALE, factory=factory), reason="a test").__enter__()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"wrapper": tagging("a"), "replace": thrice},
        {"wrapper": tagging("a"), "factory": lambda: thrice},
        {"replace": thrice, "factory": lambda: thrice},
        {"kind": "delete", "replace": thrice},
        {"kind": "delete", "wrapper": tagging("a")},
        {"kind": "add"},
        {"factory": 3},
    ],
    ids=lambda fields: "-".join(fields) or "nothing",
)
def test_exactly_one_way_is_given(fields: dict[str, Any]) -> None:
    with pytest.raises((patches.DefinitionError, TypeError), match=r"wrapper|replace|factory"):
        made(SCALE, **fields)


def test_a_replacement_is_registered_by_a_decorator_or_as_a_patch() -> None:
    patches.register(made(SCALE, id="fake.replacing", replace=thrice))
    with patches.transaction("fake.replacing"):
        assert functions.scale(1) == 3


# Transactions --------------------------------------------------------------------------------------------------------


def test_a_transaction_decorates_a_function() -> None:
    @patches.transaction(declare("a", SCALE))
    def work(x: int, *, by: int = 2) -> Any:
        """Scale."""
        return functions.scale(x, by=by)

    assert functions.scale(2) == 4
    assert (work.__name__, work.__doc__, str(inspect.signature(work))) == (
        "work",
        "Scale.",
        "(x: 'int', *, by: 'int' = 2) -> 'Any'",
    )
    assert [work(2), work(2, by=3)] == [("a", 4), ("a", 6)]
    assert functions.scale(2) == 4
    with pytest.raises(TypeError):
        work("a", by="b")
    assert functions.scale(2) == 4


def test_a_decorated_function_calls_itself_and_runs_in_threads() -> None:
    @patches.transaction(declare("a", SCALE), reason="a test")
    def down(n: int) -> Any:
        return functions.scale(2) if n == 0 else down(n - 1)

    assert down(3) == ("a", 4)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(down(2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("a", 4)] * 4


def test_a_transaction_decorates_a_coroutine_function_for_as_long_as_it_runs() -> None:
    @patches.transaction(declare("a", SCALE), reason="a test")
    async def work() -> Any:
        await asyncio.sleep(0)
        return functions.scale(2)

    assert inspect.iscoroutinefunction(work)
    waiting = work()
    assert functions.scale(2) == 4
    assert asyncio.run(waiting) == ("a", 4)
    assert functions.scale(2) == 4


def test_a_decorated_asynchronous_generator_takes_what_is_sent_and_thrown_into_it() -> None:
    ended: list[str] = []

    @patches.transaction(declare("a", SCALE))
    async def work() -> AsyncGenerator[Any, Any]:
        try:
            sent = yield functions.scale(2)
            yield sent
        except KeyError:
            yield "caught"
        finally:
            ended.append("ended")

    async def use() -> list[Any]:
        one, two = work(), work()
        taken = [await one.asend(None), await one.asend(7), await two.asend(None), await two.athrow(KeyError())]
        await one.aclose()
        return [*taken, *ended, [item async for item in two]]

    assert asyncio.run(use()) == [("a", 4), 7, ("a", 4), "caught", "ended", []]
    assert functions.scale(2) == 4


def test_the_reason_defaults_to_each_patch_s_own() -> None:
    one, two = declare("a", SCALE, reason="too slow"), declare("b", FORWARD, reason="wrong on meta")
    with patches.transaction(one, two):
        assert [row.reason for row in patches.audit()] == ["too slow", "wrong on meta"]
    with patches.transaction(one, reason="a benchmark"):
        assert [row.reason for row in patches.audit()] == ["a benchmark"]


@pytest.mark.parametrize("cycle", [False, True])
def test_a_transaction_that_is_dropped_while_open_undoes_itself(cycle: bool) -> None:
    tx: Any = patches.transaction(declare("a", SCALE), reason="a test").__enter__()
    if cycle:
        tx.itself = [tx]
    assert functions.scale(2) == ("a", 4)
    del tx
    gc.collect()
    assert functions.scale(2) == 4
    assert patches.active() == []


def test_what_a_dropped_transaction_has_committed_stays() -> None:
    tx = patches.transaction(declare("a", SCALE), reason="a test").__enter__()
    tx.commit()
    tx.apply(declare("b", FORWARD))
    del tx
    gc.collect()
    assert [receipt.id for receipt in patches.active()] == ["fake.a"]
    patches.revert_all()


def test_everything_is_reverted_at_once() -> None:
    with patches.transaction(declare("a", SCALE), declare("b", FORWARD), reason="a test") as tx:
        tx.commit()
        with patches.transaction(declare("c", SCALE), reason="a test"):
            patches.revert_all()
            assert (functions.scale(2), patches.active(), len(patches.audit())) == (4, [], 0)
    patches.revert_all()
    assert patches.active() == []


# Counts --------------------------------------------------------------------------------------------------------------

COUNTED = """
import sys, threading, types
import patches
lib = types.ModuleType("lib"); sys.modules["lib"] = lib
exec("import functools\\ndef f(x): return x\\n@functools.lru_cache\\ndef g(x): return x\\n", lib.__dict__)

for name in ("f", "g"):
    def wrapper(wrapped, instance, args, kwargs, id=f"lib.{name}"):
        if args[0] % 2:
            patches.passed(id)
            return wrapped(*args)
        return "acted", wrapped(*args)
    patch = patches.Patch(id=f"lib.{name}", target=f"lib:{name}", wrapper=wrapper, reason="r")
    with patches.transaction(patch) as tx:
        for x in range(10):
            getattr(lib, name)(x)
        getattr(lib, name)(0)
        (receipt,) = tx.receipts
        print(name, receipt.calls, receipt.passed, "calls" in str(patches.audit()))
    print(name, receipt.calls, receipt.passed)
"""


@pytest.mark.parametrize("count", ["1", ""])
def test_a_whole_process_counts_from_outside(count: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATCHES_COUNT": count}
    ran = subprocess.run(
        [sys.executable, "-c", COUNTED], check=False, capture_output=True, text=True, timeout=60, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    if count:
        assert lines == [["f", "11", "5", "True"], ["f", "11", "5"], ["g", "11", "5", "True"], ["g", "11", "5"]]
    else:
        assert [line[1] for line in lines] == ["None"] * 4


def test_counts_on_request_tell_what_was_passed_through() -> None:
    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        if args[0] > 2:
            patches.passed("fake.a")
        return wrapped(*args, **kwargs)

    with patches.transaction(declare("a", SCALE, wrapper=wrapper), reason="a test", count_calls=True) as tx:
        for x in range(5):
            functions.scale(x)
        assert (tx.receipts[0].calls, tx.receipts[0].passed) == (5, 2)


def test_a_patch_that_is_not_counted_may_say_passed() -> None:
    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        patches.passed("fake.a")
        return wrapped(*args, **kwargs)

    with patches.transaction(declare("a", SCALE, wrapper=wrapper), reason="a test"):
        assert functions.scale(2) == 4
    patches.passed("fake.nobody")


def test_a_thread_that_is_inside_a_counted_call_holds_nobody_up() -> None:
    """Counting takes no lock that lasts, and a call inside a call counts too."""
    entered, go_on = threading.Event(), threading.Event()

    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        if args[0] == 0:
            entered.set()
            go_on.wait(20)
        return wrapped(*args, **kwargs)

    with patches.transaction(declare("a", SCALE, wrapper=wrapper), reason="a test", count_calls=True) as tx:
        thread = threading.Thread(target=functions.scale, args=(0,))
        thread.start()
        assert entered.wait(20)
        functions.scale(1)
        assert tx.receipts[0].calls == 2
        go_on.set()
        thread.join()


# Lifetimes -----------------------------------------------------------------------------------------------------------


class Model:
    registry: ClassVar[list[Any]] = []


@pytest.mark.parametrize("cycle", [False, True])
def test_receipts_are_kept_as_long_as_an_object_lives(cycle: bool) -> None:
    model: Any = Model()
    if cycle:
        model.itself = model
    with patches.transaction(declare("a", SCALE), declare("b", FORWARD), reason="a test") as tx:
        patches.keep(tx.receipts, model)
        tx.commit()
    del tx
    gc.collect()
    assert (functions.scale(2), layers.Base().forward(1)) == (("a", 4), ("b", ("Base", 1)))
    del model
    gc.collect()
    assert (functions.scale(2), layers.Base().forward(1)) == (4, ("Base", 1))
    assert len(patches.audit()) == 0


def test_what_is_kept_can_be_reverted_before() -> None:
    model = Model()
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.commit()
    patches.keep(tx.receipts, model)
    patches.revert(*tx.receipts)
    assert functions.scale(2) == 4
    with patches.transaction(declare("a", SCALE), reason="a test"):
        del model
        gc.collect()
        assert functions.scale(2) == ("a", 4)


def test_what_cannot_be_watched_cannot_keep() -> None:
    with (
        patches.transaction(declare("a", SCALE), reason="a test") as tx,
        pytest.raises(patches.PatchError, match="int"),
    ):
        patches.keep(tx.receipts, 3)


def test_objects_join_a_live_scope() -> None:
    one, two, three = (layers.Base() for _ in range(3))
    with patches.transaction(declare("a", FORWARD), reason="a test", on=[one]) as tx:
        (receipt,) = tx.receipts
        receipt.extend([two])
        assert [base.forward(1)[0] for base in (one, two, three)] == ["a", "a", "Base"]
        assert receipt.scope_text == "2 instances"
        del one
        gc.collect()
        assert receipt.scope_text == "1 instance"
        assert two.forward(1)[0] == "a"
    assert two.forward(1)[0] == "Base"


def test_a_scope_that_was_extended_ends_with_its_last_object() -> None:
    one, two = layers.Base(), layers.Base()
    with patches.transaction(declare("a", FORWARD), reason="a test", on=[one]) as tx:
        tx.receipts[0].extend([two])
        tx.commit()
    del one
    gc.collect()
    assert len(patches.active()) == 1
    del two
    gc.collect()
    assert patches.active() == []


@pytest.mark.parametrize("why", ["undone", "process"])
def test_no_object_joins_what_has_no_live_scope(why: str) -> None:
    one, two = layers.Base(), layers.Base()
    with patches.transaction(declare("a", FORWARD), reason="a test", on=None if why == "process" else [one]) as tx:
        if why == "process":
            with pytest.raises(patches.PatchError):
                tx.receipts[0].extend([two])
    if why == "undone":
        with pytest.raises(patches.PatchError):
            tx.receipts[0].extend([two])
    assert two.forward(1) == ("Base", 1)


def test_a_predicate_decides_for_each_call() -> None:
    small, large = layers.Unhashable(1), layers.Unhashable(9)
    patch = patches.on(declare("a", f"{LAYERS}:Unhashable.to"), lambda quantized: quantized.value > 5)
    with patches.transaction(patch, reason="a test") as tx:
        assert (small.to("cpu"), large.to("cpu")) == ("cpu", ("a", "cpu"))
        small.value = 6
        assert small.to("cpu") == ("a", "cpu")
        assert layers.Unhashable(7).to("cpu") == ("a", "cpu"), "objects made later are covered too"
        assert tx.receipts[0].scope_text not in ("process", "0 instances")
        tx.commit()
    del small, large
    gc.collect()
    assert len(patches.active()) == 1, "there is no last object"
    patches.revert_all()


def test_a_predicate_gets_the_subject() -> None:
    patch = declare("a", f"{FUNCTIONS}:describe", subject=lambda instance, args, kwargs: args[0])
    with patches.transaction(patches.on(patch, lambda layer: isinstance(layer, layers.Derived)), reason="a test"):
        assert functions.describe(layers.Derived()) == ("a", "Derived")
        assert functions.describe(layers.Base()) == "Base"


def test_predicates_and_instances_add_up() -> None:
    one, two, three = layers.Unhashable(1), layers.Unhashable(2), layers.Unhashable(3)
    patch = declare("a", f"{LAYERS}:Unhashable.to")
    with (
        patches.transaction(patches.on(patch, lambda it: it.value == 1), reason="a test"),
        patches.transaction(patches.on(patch, [two]), reason="a test"),
        patches.transaction(patches.on(patch, lambda it: it.value < 3), reason="a test"),
    ):
        assert [it.to("x") for it in (one, two, three)] == [("a", "x"), ("a", "x"), "x"]


def test_an_ordered_mapping_is_put_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    table = collections.OrderedDict(a=1, b=2, c=3)
    monkeypatch.setattr(values, "TABLE", table, raising=False)
    with patches.transaction(made(f"{VALUES}:TABLE[b]", kind="delete")):
        assert list(table) == ["a", "c"]
    assert list(table.items()) == [("a", 1), ("b", 2), ("c", 3)]
    monkeypatch.undo()
