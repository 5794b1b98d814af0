"""Classes with one method of each kind, inheriting them, storing attributes in several ways."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Self


class Base:
    def forward(self, x: int) -> tuple[str, int]:
        return type(self).__name__, x

    @classmethod
    def build(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    @staticmethod
    def add(x: int, y: int) -> int:
        return x + y

    @property
    def size(self) -> int:
        return 7

    @size.setter
    def size(self, value: int) -> None:
        vars(self)["asked"] = value

    @functools.cached_property
    def expensive(self) -> int:
        return 1

    write_only = property(fset=lambda self, value: None)
    table: ClassVar = {"a": 1}


class Derived(Base):
    pass


class Made:
    """With constructors of its own."""

    def __new__(cls, value: int) -> Self:
        return super().__new__(cls)

    def __init__(self, value: int) -> None:
        self.value = value

    def __call__(self, x: int) -> int:
        return x + self.value


class Slotted:
    __slots__ = ("weight",)


class Unhashable:
    """Like bitsandbytes' QuantState: compares by value, so has no hash."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    def to(self, device: str) -> str:
        return device


class Holder:
    """Like torch.nn.Module: parameters are in a dictionary of their own, which `__getattr__` looks into."""

    scale = 1

    def __init__(self, weight: Any) -> None:
        self.__dict__["parameters"] = {"weight": weight}

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("parameters", {})
        if name in parameters:
            return parameters[name]
        raise AttributeError(f"stock: no {name}")


class Leaf(Holder):
    pass
