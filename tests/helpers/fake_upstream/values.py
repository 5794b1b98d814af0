"""Targets that are not called: constants, items, defaults, classes, attributes of objects; and what refuses."""

from __future__ import annotations

import enum
from collections import defaultdict
from types import MappingProxyType
from typing import Any, ClassVar

LIMIT: Any = 3
ACTIVATIONS: dict[Any, Any] = {"relu": lambda x: max(x, 0), 1: "one", "other": "value"}
ON_DEMAND: defaultdict[str, list[int]] = defaultdict(list)
STEPS: list[Any] = ["first", "second"]
FROZEN = MappingProxyType({"a": 1})


def resize(image: str, size: Any = 10, mode: Any = "fast", *, pad: Any = 0) -> tuple[Any, ...]:
    return image, size, mode, pad


class Options:
    """Of which there is one object, that everybody uses."""

    kinds: ClassVar = ("a", "b")

    def __init__(self) -> None:
        self.level: Any = 1
        self.callback = lambda x: x + 1

    def describe(self, x: int) -> tuple[Any, int]:
        return self.level, x

    @property
    def doubled(self) -> int:
        return 2 * int(self.level)


OPTIONS = Options()


class Box:
    """A class to replace."""

    def __init__(self, content: Any) -> None:
        self._content = content

    @property
    def content(self) -> Any:
        return self._content

    @content.setter
    def content(self, value: Any) -> None:
        self._content = value


class SubBox(Box):
    pass


class ReadOnly:
    @property
    def content(self) -> int:
        return 1


class Guarded(type):
    """Classes that cannot be changed."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError("closed")


class Closed(metaclass=Guarded):
    def run(self) -> int:
        return 1


class Color(enum.Enum):
    RED = 1


class Elsewhere:
    """An object whose attributes are stored in a dictionary of its own."""

    def __init__(self) -> None:
        self.__dict__["stored"] = {}

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__["stored"][name] = value

    def run(self) -> int:
        return 1


ELSEWHERE = Elsewhere()


class Case:
    """Replaced as a whole."""

    tag = ""
