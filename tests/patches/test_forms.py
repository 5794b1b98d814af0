"""Whatever form a target has, a patch acts on it, and leaves it what it is: it copies, pickles and introspects."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import multiprocessing
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import patches
from tests.helpers import form_targets
from tests.helpers.form_targets import FORM_OWNERS, FORMS, Form, through
from tests.helpers.snapshot import Snapshot

METHODS = [name for name in FORMS if "." in name and not name.endswith("static")]
FUNCTIONS = [name for name in FORMS if "." not in name]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[Snapshot]:
    taken = Snapshot(*FORM_OWNERS)
    yield taken
    active, differences = patches.active(), taken.differences()
    patches.revert(*active)
    taken.restore()
    assert (active, differences) == ([], [])


@pytest.fixture
def seen() -> list[str]:
    """One item for each call that went through the patch."""
    return []


def patched(form: Form, seen: list[str]) -> patches.Transaction:
    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append(form.path)
        return wrapped(*args, **kwargs)

    patch = patches.Patch(id="fake.form", target=form.target, wrapper=wrapper, reason="a test")
    return patches.transaction(patch, reason="a test")


def called(function: Callable[..., Any], form: Form) -> Any:
    return through(function(form.argument))


@pytest.mark.parametrize("name", FORMS)
def test_a_patch_acts_on_every_form_and_undo_is_exact(name: str, seen: list[str], unchanged: Snapshot) -> None:
    form = FORMS[name]
    stock = called(form.read(), form)
    with patched(form, seen):
        assert called(form.read(), form) == stock
        assert len(seen) == 1
        form.read()
    assert unchanged.differences() == []
    assert called(form.read(), form) == stock
    assert len(seen) == 1


IS = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction, inspect.ismethod, callable)


def looks(function: Any) -> dict[str, Any]:
    """What a caller can ask of a function."""
    seen: dict[str, Any] = {name: getattr(function, name, None) for name in ("__name__", "__doc__")}
    if not isinstance(function, type({}.get)):  # those of C name the class that they were bound on
        seen |= {name: getattr(function, name, None) for name in ("__qualname__", "__module__")}
    with contextlib.suppress(ValueError):  # some of those written in C have no signature
        seen["signature"] = str(inspect.signature(function))
    own = inspect.unwrap(function)
    seen["defaults"] = getattr(own, "__defaults__", None), getattr(own, "__kwdefaults__", None)
    return {**seen, "getdoc": inspect.getdoc(function), **{check.__name__: check(function) for check in IS}}


@pytest.mark.parametrize("name", FORMS)
def test_it_looks_like_the_original(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    stock = looks(form.read())
    on_class = looks(getattr(type(form.receiver()), form.name)) if name in METHODS else None
    with patched(form, seen):
        found = looks(form.read())
        assert not str(getattr(form.read(), "__module__", "")).startswith("patches")
        assert found == {**stock, **(may_differ(found) if name == "Table.get" else {})}
        if on_class is not None and name != "Table.get":
            assert looks(getattr(type(form.receiver()), form.name)) == on_class
    assert looks(form.read()) == stock


def may_differ(found: dict[str, Any]) -> dict[str, Any]:
    """What differs if a method of C becomes one of Python."""
    return {key: found[key] for key in ("__qualname__", "__module__", "ismethod") if key in found}


@pytest.mark.parametrize("name", [name for name in FORMS if name != "Table.get"])
def test_the_original_is_found_inside(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    stock = inspect.unwrap(form.read())
    with patched(form, seen):
        inside = inspect.unwrap(form.read())
        if inspect.isroutine(stock):
            assert getattr(inside, "__func__", inside) is getattr(stock, "__func__", stock) or inside == stock
        else:
            assert inside is stock


def copies(value: Any, *, protocols: tuple[int, ...] = (2, 4, 5)) -> dict[str, Any]:
    return {
        "copy": copy.copy(value),
        "deepcopy": copy.deepcopy(value),
        **{f"pickle {protocol}": pickle.loads(pickle.dumps(value, protocol)) for protocol in protocols},
    }


class Taker:
    """An object that has taken a function, as models take their activations."""

    def __init__(self, taken: Any) -> None:
        self.taken = taken
        self.again = [taken]


@pytest.mark.parametrize("name", FORMS)
def test_it_copies_and_pickles_while_patched(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    stock = called(form.read(), form)
    copies(form.read())  # the original can
    # Python pickles a function by its name, and this one's is that of the base's.
    protocols = () if name == "Derived.static" else (2, 4, 5)
    with patched(form, seen):
        for how, made in copies(form.read(), protocols=protocols).items():
            assert called(made, form) == stock, how
        assert len(seen) >= 2, "a copy in this process is patched too"
        for how, holder in copies(Taker(form.read()), protocols=protocols).items():
            assert called(holder.taken, form) == called(holder.again[0], form) == stock, how


@pytest.mark.parametrize("name", FORMS)
def test_what_was_taken_while_patched_is_stock_and_copies_after_undo(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    stock = called(form.read(), form)
    with patched(form, seen):
        holder = Taker(form.read())
    for one in (holder, *copies(holder).values()):
        assert called(one.taken, form) == called(one.again[0], form) == stock
    assert seen == []


@pytest.mark.parametrize("name", ["plain", "cached", "Base.method", "Base.later", "Derived.of_class"])
def test_a_pickle_of_a_patched_thing_is_read_after_undo(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    stock = called(form.read(), form)
    with patched(form, seen):
        data = pickle.dumps(Taker(form.read()))
    assert called(pickle.loads(data).taken, form) == stock
    assert seen == []


@pytest.mark.parametrize("name", ["Base.method", "Derived.method", "Base.later", "Derived.each", "Point.scaled"])
def test_a_deep_copied_bound_method_belongs_to_the_copy(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    with patched(form, seen):
        receiver = form.receiver()
        receiver.taken = getattr(receiver, form.name)
        copied = copy.deepcopy(receiver)
        assert copied.taken.__self__ is copied
        assert copied.taken == getattr(copied, form.name)
        assert hash(copied.taken) == hash(getattr(copied, form.name))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("Table.get", "Pair.total", "OBJECT.method")])
def test_a_weak_method_lives_as_long_as_its_object(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    with patched(form, seen):
        receiver = copy.copy(form.receiver())
        bound = getattr(receiver, form.name)
        weak = weakref.WeakMethod(bound)
        del bound
        gc.collect()
        assert called(weak(), form) == called(getattr(receiver, form.name), form)  # type: ignore[arg-type]
        assert len(seen) == 2
        is_of_class = name.endswith("of_class")
        del receiver
        gc.collect()
        assert (weak() is None) == (not is_of_class)


def test_a_cache_keeps_its_methods(seen: list[str]) -> None:
    form_targets.cached.cache_clear()
    form_targets.cached(1)
    with patched(FORMS["cached"], seen):
        assert form_targets.cached.cache_info().currsize == 1
        assert (form_targets.cached(1), form_targets.cached(2)) == (6, 7)
        assert form_targets.cached.cache_info().hits == 1
        assert form_targets.cached.cache_parameters()["maxsize"] == 128
        form_targets.cached.cache_clear()
        assert form_targets.cached.cache_info().currsize == 0
    assert form_targets.cached.cache_info().currsize == 0


def test_a_single_dispatch_function_takes_registrations_that_stay(seen: list[str]) -> None:
    with patched(FORMS["dispatched"], seen):

        @form_targets.dispatched.register
        def _(x: bytes) -> int:
            return 100

        assert [form_targets.dispatched(x) for x in (1, "two", b"three")] == [7, 3, 100]
        assert len(seen) == 3
        assert form_targets.dispatched.dispatch(bytes) is form_targets.dispatched.registry[bytes]
    assert form_targets.dispatched(b"") == 100


@pytest.mark.parametrize("name", FORMS)
def test_functools_can_wrap_it(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    stock = form.read()
    with patched(form, seen):
        taken = form.read()
        around = functools.wraps(taken)(lambda *args: taken(*args))  # noqa: PLW0108 - a function around it
        assert around.__wrapped__ is taken
        for attribute in ("__name__", "__doc__"):
            assert getattr(around, attribute) == getattr(stock, attribute, getattr(around, attribute))
        assert called(around, form) == called(stock, form)
        assert seen[:1] == [form.path]


@pytest.mark.parametrize("name", ["method", "of_class", "static", "later", "each", "each_later"])
@pytest.mark.parametrize("base", [form_targets.Base, form_targets.Derived])
def test_a_subclass_overrides_it_and_calls_super(base: type, name: str, seen: list[str]) -> None:
    form = FORMS[f"{base.__name__}.{name}"]
    own = {
        "method": lambda self, x: super(override, self).method(x),
        "of_class": classmethod(lambda cls, x: super(override, cls).of_class(x)),
        "static": staticmethod(lambda x: super(override, override).static(x)),
        **{name: lambda self, x, name=name: getattr(super(override, self), name)(x) for name in ("later", "each")},
        "each_later": lambda self, x: super(override, self).each_later(x),
    }[name]
    override: Any = type("override", (base,), {name: own})
    stock = called(getattr(override(), name), form)
    with patched(form, seen):
        assert called(getattr(override(), name), form) == stock
        assert len(seen) == 1
    assert called(getattr(override(), name), form) == stock


def test_a_generator_takes_what_is_sent_and_thrown_into_it(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    def conversation(x: int) -> Iterator[Any]:
        try:
            answer = yield x
            yield ("got", answer)
        except KeyError:
            yield "caught"

    monkeypatch.setattr(form_targets, "generator", conversation)
    with patched(FORMS["generator"], seen):
        talk: Any = form_targets.generator(1)
        assert [next(talk), talk.send(2)] == [1, ("got", 2)]
        talk = form_targets.generator(1)
        next(talk)
        assert talk.throw(KeyError()) == "caught"


@pytest.mark.parametrize("name", ["plain", "defaulted", "cached"])
def test_a_pool_of_spawned_processes_takes_a_patched_function(name: str, seen: list[str]) -> None:
    form = FORMS[name]
    with patched(form, seen), multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(form.read(), [1, 2]) == [form.read()(1), form.read()(2)]
        assert pool.apply(FORMS["Base.method"].read(), (3,)) == ("Base", 6)


@pytest.mark.parametrize("name", FORMS)
def test_two_patches_nest_and_are_undone_in_any_order(name: str, unchanged: Snapshot) -> None:
    form = FORMS[name]
    stock, order = called(form.read(), form), []

    def patch(tag: str) -> patches.Patch:
        def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            order.append(tag)
            return wrapped(*args, **kwargs)

        return patches.Patch(id=f"fake.{tag}", target=form.target, wrapper=wrapper, reason="a test")

    for first in (0, 1):
        with patches.transaction(patch("inner"), patch("outer"), reason="a test") as tx:
            tx.commit()
        order.clear()
        assert called(form.read(), form) == stock
        assert order == ["outer", "inner"]
        patches.revert(tx.receipts[first])
        order.clear()
        assert called(form.read(), form) == stock
        assert order == [["outer"], ["inner"]][first]
        patches.revert(tx.receipts[1 - first])
        assert unchanged.differences() == []
