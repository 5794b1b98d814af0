"""`docs/patches-semantics.md`: what peers do to a library is done here with the same effect, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import pytest
import wrapt

import patches

SOURCE = """
import functools

LIMIT = 3
TABLE = {"a": 1, "b": 2}


def scale(x, by=2):
    return x * by


@functools.lru_cache
def cached(x):
    return x


class Base:
    def area(self):
        return 1


class Box(Base):
    def __init__(self):
        self.weight = 1

    @property
    def size(self):
        return 1

    @classmethod
    def made(cls):
        return cls.__name__

    @staticmethod
    def opened():
        return True
"""
NAME = "peers_victim"


@pytest.fixture
def victim(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType(NAME)
    exec(SOURCE, vars(module))
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setenv("PEERS", "stock")
    return module


def everything(victim: types.ModuleType) -> list[Any]:
    """Every entry that could change, by identity and in order."""
    places = (vars(victim), vars(victim.Box), vars(victim.Base), victim.TABLE)
    entries = [[(name, id(value)) for name, value in place.items() if name != "__builtins__"] for place in places]
    return [*entries, os.environ.get("PEERS"), os.environ.get("PEERS_NEW")]


def replacement(*args: Any, **kwargs: Any) -> Any:
    return ("replaced", args[-1:], kwargs)


def make() -> Any:
    return replacement


def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return ("wrapped", wrapped(*args, **kwargs))


def seven(self: Any) -> int:
    return 7


def seven_of_class(cls: Any) -> int:
    return 7


@contextlib.contextmanager
def pytests(method: str, *arguments: Any, **options: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        getattr(monkeypatch, method)(*arguments, **options)
        yield


@contextlib.contextmanager
def wrapts(victim: types.ModuleType, path: str) -> Iterator[None]:
    owner, name, original = wrapt.resolve_path(victim, path)
    wrapt.wrap_function_wrapper(victim, path, wrapper)
    yield
    setattr(owner, name, original)


Peer = Callable[[types.ModuleType], AbstractContextManager[Any]]
Look = Callable[[types.ModuleType], Any]


def boxed(name: str) -> Look:
    return lambda victim: getattr(victim.Box(), name)()


def scaled(victim: types.ModuleType) -> Any:
    return victim.scale(3)


def tables(victim: types.ModuleType) -> Any:
    return list(victim.TABLE.items())


def environment(_: types.ModuleType) -> Any:
    return os.environ.get("PEERS"), os.environ.get("PEERS_NEW")


SCALE, TABLE = f"{NAME}:scale", f"{NAME}:TABLE"
CASES: dict[str, tuple[Peer, dict[str, Any], Look]] = {
    "wrapt: a function": (lambda v: wrapts(v, "scale"), {"target": SCALE, "wrapper": wrapper}, scaled),
    "wrapt: a method": (
        lambda v: wrapts(v, "Base.area"), {"target": f"{NAME}:Base.area", "wrapper": wrapper}, boxed("area"),
    ),
    "wrapt: an lru_cache": (
        lambda v: wrapts(v, "cached"), {"target": f"{NAME}:cached", "wrapper": wrapper}, lambda v: v.cached(1),
    ),
    "mock: a name": (
        lambda _: mock.patch(f"{NAME}.scale", replacement), {"target": SCALE, "replace": replacement}, scaled,
    ),
    "mock: an object": (
        lambda v: mock.patch.object(v, "scale", replacement), {"at": "scale", "replace": replacement}, scaled,
    ),
    "mock: a factory": (
        lambda _: mock.patch(f"{NAME}.scale", new_callable=make), {"target": SCALE, "factory": make}, scaled,
    ),
    "mock: a constant": (
        lambda _: mock.patch(f"{NAME}.LIMIT", 9), {"target": f"{NAME}:LIMIT", "replace": 9}, lambda v: v.LIMIT,
    ),
    "mock: an item": (
        lambda v: mock.patch.dict(v.TABLE, a=9), {"target": f"{TABLE}[a]", "kind": "value", "replace": 9}, tables,
    ),
    "mock: a new item": (
        lambda v: mock.patch.dict(v.TABLE, c=9), {"target": f"{TABLE}[c]", "kind": "add", "replace": 9}, tables,
    ),
    "mock: a new name": (
        lambda _: mock.patch(f"{NAME}.more", 9, create=True),
        {"target": f"{NAME}:more", "kind": "add", "replace": 9}, lambda v: v.more,
    ),
    "mock: a property": (
        lambda _: mock.patch(f"{NAME}.Box.size", new_callable=mock.PropertyMock, return_value=7),
        {"target": f"{NAME}:Box.size", "replace": seven}, lambda v: v.Box().size,
    ),
    "mock: an inherited method": (
        lambda _: mock.patch(f"{NAME}.Box.area", seven),
        {"target": f"{NAME}:Box.area", "replace": seven}, boxed("area"),
    ),
    "pytest: a name": (
        lambda _: pytests("setattr", f"{NAME}.scale", replacement), {"target": SCALE, "replace": replacement}, scaled,
    ),
    "pytest: delete a name": (
        lambda v: pytests("delattr", v, "scale"), {"target": SCALE, "kind": "delete"}, lambda v: hasattr(v, "scale"),
    ),
    "pytest: delete an absent name": (
        lambda v: pytests("delattr", v, "gone", raising=False),
        {"target": f"{NAME}:gone", "kind": "delete", "optional": True}, lambda v: hasattr(v, "gone"),
    ),
    "pytest: an item": (
        lambda v: pytests("setitem", v.TABLE, "a", 9), {"target": f"{TABLE}[a]", "kind": "value", "replace": 9}, tables,
    ),
    "pytest: delete an item": (
        lambda v: pytests("delitem", v.TABLE, "b"), {"target": f"{TABLE}[b]", "kind": "delete"}, tables,
    ),
    "pytest: set a variable": (
        lambda _: pytests("setenv", "PEERS", "x"),
        {"target": "os:environ[PEERS]", "kind": "value", "replace": "x"}, environment,
    ),
    "pytest: a new variable": (
        lambda _: pytests("setenv", "PEERS_NEW", "x"),
        {"target": "os:environ[PEERS_NEW]", "kind": "add", "replace": "x"}, environment,
    ),
    "pytest: delete a variable": (
        lambda _: pytests("delenv", "PEERS"), {"target": "os:environ[PEERS]", "kind": "delete"}, environment,
    ),
    "pytest: prepend to a variable": (
        lambda _: pytests("setenv", "PEERS", "x", prepend=":"),
        {"target": "os:environ[PEERS]", "kind": "value", "wrapper": lambda wrapped, *_: f"x:{wrapped()}"}, environment,
    ),
    "pytest: a static method": (
        lambda v: pytests("setattr", v.Box, "opened", staticmethod(lambda: 7)),
        {"target": f"{NAME}:Box.opened", "replace": lambda: 7}, boxed("opened"),
    ),
    "pytest: a classmethod": (
        lambda v: pytests("setattr", v.Box, "made", classmethod(seven_of_class)),
        {"target": f"{NAME}:Box.made", "replace": seven_of_class}, boxed("made"),
    ),
}  # fmt: skip


def patch(fields: dict[str, Any], victim: types.ModuleType) -> patches.Patch:
    target = patches.at(victim, fields["at"]) if "at" in fields else fields["target"]
    rest = {name: value for name, value in fields.items() if name not in ("at", "target")}
    return patches.Patch(id="peers.one", target=target, reason="a test", **rest)


@pytest.mark.parametrize("case", CASES)
def test_the_effect_is_the_peers_and_nothing_is_left(case: str, victim: types.ModuleType) -> None:
    peer, fields, look = CASES[case]
    with peer(victim):
        theirs = look(victim)
    before = everything(victim)  # afterwards, since monkeypatch puts back what it has deleted in last place
    with patches.transaction(patch(fields, victim)):
        assert look(victim) == theirs
    assert everything(victim) == before


def test_an_order_of_ending_that_mock_gets_wrong(victim: types.ModuleType) -> None:
    def by(name: str) -> patches.Patch:
        return patches.Patch(id=f"peers.{name}", target=SCALE, replace=lambda x, by=2: name, reason="a test")

    stock = victim.scale
    first, second = (mock.patch(f"{NAME}.scale", name) for name in ("first", "second"))
    first.start()
    second.start()
    first.stop()
    second.stop()
    assert victim.scale == "first"
    victim.scale = stock
    with ExitStack() as outer, ExitStack() as inner:
        outer.enter_context(patches.transaction(by("first")))
        inner.enter_context(patches.transaction(by("second")))
        outer.close()
        assert victim.scale(1) == "second"
    assert victim.scale is stock


def test_a_decorator_of_functions_and_of_coroutine_functions(victim: types.ModuleType) -> None:
    replaced = patch({"target": SCALE, "replace": replacement}, victim)

    @patches.transaction(replaced)
    def plain() -> Any:
        return scaled(victim)

    @patches.transaction(replaced)
    async def coroutine() -> Any:
        await asyncio.sleep(0)
        return scaled(victim)

    assert plain() == plain() == asyncio.run(coroutine()) == replacement(3)
    assert scaled(victim) == 6


def test_stopall(victim: types.ModuleType) -> None:
    with patches.transaction(patch({"target": SCALE, "replace": replacement}, victim)) as transaction:
        transaction.commit()
    assert scaled(victim) == replacement(3)
    patches.revert_all()
    assert scaled(victim) == 6
    assert patches.active() == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target": f"{NAME}:gone", "replace": seven}, "gone"),
        ({"target": f"{NAME}:scael", "replace": seven}, f"{NAME}:scale"),
        ({"target": SCALE, "kind": "add", "replace": seven}, "is there already"),
        ({"target": f"{NAME}:gone", "kind": "delete"}, "gone"),
    ],
)
def test_what_is_not_as_declared_is_refused(fields: dict[str, Any], told: str, victim: types.ModuleType) -> None:
    with pytest.raises(patches.PatchError, match=told), patches.transaction(patch(fields, victim)):
        pass
