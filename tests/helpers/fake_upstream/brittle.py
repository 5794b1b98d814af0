"""A class that refuses to be changed on demand."""

from __future__ import annotations

from typing import ClassVar


class Brittle(type):
    """Of classes that raise when an attribute in `refusing` is to become another object."""

    refusing: ClassVar[set[str]] = set()

    def __setattr__(cls, name: str, value: object) -> None:
        if name in Brittle.refusing and value is not vars(cls).get(name):
            raise RuntimeError(f"{name} is refused")
        super().__setattr__(name, value)


class Fragile(metaclass=Brittle):
    def one(self) -> int:
        return 1

    def two(self) -> int:
        return 2

    def three(self) -> int:
        return 3

    def four(self) -> int:
        return 4

    def five(self) -> int:
        return 5

    def six(self) -> int:
        return 6
