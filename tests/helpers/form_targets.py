"""One target for every form of a thing that is called, and ways to read and call each. Imports nothing heavy."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["FORMS", "FORM_OWNERS", "OBJECT", "Form", "through"]


def plain(x: int) -> int:
    """Add one."""
    return x + 1


def defaulted(x: int, by: int = 2, *, shift: int = 0) -> int:
    """Scale, then shift."""
    return x * by + shift


async def coroutine(x: int) -> int:
    """Add three, later."""
    return x + 3


def generator(x: int) -> Iterator[int]:
    """Count up."""
    yield from range(x)


async def async_generator(x: int) -> AsyncIterator[int]:
    """Count up, later."""
    for number in range(x):
        yield number


@functools.lru_cache
def cached(x: int) -> int:
    """Add five, once."""
    return x + 5


@functools.singledispatch
def dispatched(x: Any) -> int:
    """Add six."""
    return int(x) + 6


@dispatched.register
def _(x: str) -> int:
    return len(x)


class Adder:
    """A callable object."""

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, x: int) -> int:
        """Add."""
        return x + self.by


floor = math.floor
builtin = abs
partial = functools.partial(defaulted, by=7)
adder = Adder(8)


class Base:
    """A method of each form."""

    def method(self, x: int, by: int = 2) -> tuple[str, int]:
        """Name and multiply."""
        return type(self).__name__, x * by

    @classmethod
    def of_class(cls, x: int) -> tuple[str, int]:
        """Name the class."""
        return cls.__name__, x

    @staticmethod
    def static(x: int) -> int:
        """Add nine."""
        return x + 9

    async def later(self, x: int) -> int:
        """Add ten, later."""
        return x + 10

    def each(self, x: int) -> Iterator[int]:
        """Count up."""
        yield from range(x)

    async def each_later(self, x: int) -> AsyncIterator[int]:
        """Count up, later."""
        for number in range(x):
            yield number


class Derived(Base):
    """Inherits them all."""


class Table(dict[Any, Any]):
    """Inherits methods written in C."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


@dataclass
class Point:
    """Its `__eq__` and `__init__` are generated."""

    x: int

    def scaled(self, by: int) -> int:
        """Multiply."""
        return self.x * by


class Pair(NamedTuple):
    """A tuple with a method."""

    left: int

    def total(self, x: int) -> int:
        """Sum up."""
        return self.left + x


OBJECT = Base()
_HERE = importlib.import_module(__name__)
FORM_OWNERS: tuple[Any, ...] = (_HERE, Adder, Base, Derived, Table, Point, Pair, OBJECT)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A target, and what to call it on."""

    path: str
    receiver: Callable[[], Any] = lambda: _HERE
    """The object through which it is read: the module, or a new instance."""
    argument: Any = 3

    @property
    def target(self) -> str:
        """The target's address."""
        return f"{__name__}:{self.path}"

    @property
    def name(self) -> str:
        """The name at the receiver."""
        return self.path.rpartition(".")[2]

    def read(self) -> Any:
        """What a caller gets: the function, or the bound method of a new receiver."""
        return getattr(self.receiver(), self.name)


def through(result: Any) -> Any:
    """What a call comes to: generators and coroutines are run."""
    if inspect.isgenerator(result):
        return list(result)
    later = _collected(result) if inspect.isasyncgen(result) else result
    return _awaited(later) if inspect.iscoroutine(later) else later


async def _collected(stream: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in stream]


def _awaited(coroutine: Any) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("expected a coroutine that waits for nothing")


_FUNCTIONS = ("plain", "defaulted", "coroutine", "generator", "async_generator", "cached", "dispatched", "floor",
              "builtin", "partial", "adder")  # fmt: skip
_METHODS = ("method", "of_class", "static", "later", "each", "each_later")
FORMS: dict[str, Form] = {
    **{name: Form(path=name) for name in _FUNCTIONS},
    **{f"{cls.__name__}.{name}": Form(path=f"{cls.__name__}.{name}", receiver=cls)
       for cls in (Base, Derived) for name in _METHODS},
    "Table.get": Form(path="Table.get", receiver=lambda: Table({3: "three"})),
    "Point.scaled": Form(path="Point.scaled", receiver=lambda: Point(2)),
    "Point.__eq__": Form(path="Point.__eq__", receiver=lambda: Point(2), argument=Point(2)),
    "Pair.total": Form(path="Pair.total", receiver=lambda: Pair(2)),
    "OBJECT.method": Form(path="OBJECT.method", receiver=lambda: OBJECT),
}  # fmt: skip
