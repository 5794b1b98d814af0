"""Classification of a foreign patch: the kind of place, and how it was changed."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any, Final

from ..target import MISSING
from .describe import DATA, describe, is_mock, is_wrapt_wrapper, parts, without_defaults
from .walk import Binding

__all__ = ["how_of", "kind_of"]

_KINDS: Final = {
    "function": "function",
    "staticmethod": "staticmethod",
    "classmethod": "classmethod",
    "property": "property",
    "cached_property": "property",
    "_lru_cache_wrapper": "function",
    "class": "class",
    "builtin": "builtin",
    "module": "module",
}
_TRANSPARENT: Final = (
    staticmethod,
    classmethod,
    property,
    functools.cached_property,
    type(functools.lru_cache(lambda: None)),
    types.MethodType,
)


def kind_of(binding: Binding, stock: str) -> str:
    """The kind of a place, from the description of its object in a clean process."""
    if binding.is_item:
        return "item"
    kind = _KINDS.get(stock.replace("(", " ").partition(" ")[0], "attribute")
    return "method" if kind == "function" and binding.in_class else kind


def how_of(value: Any, *, now: str, stock: Sequence[str], moved: bool) -> str:
    """The way in which a place was changed; `moved` means that all code there is the package's own."""
    if now == DATA:
        return "removed" if value is MISSING else "value"
    if without_defaults(now) in map(without_defaults, stock):
        return "defaults"
    value = _inside(value, stock)
    return "moved" if moved and type(value) in (types.FunctionType, type) else _form(value)


def _inside(value: Any, stock: Sequence[str]) -> Any:
    """The function that a descriptor calls; for a property, the first accessor that differs from a clean process."""
    while type(value) in _TRANSPARENT:
        inner = [part for part in parts(value) if part is not None]
        new = [part for part in inner if not any(describe(part) in before for before in stock)]
        value = next(iter(new or inner), None)
    return value


def _form(value: Any) -> str:
    if is_wrapt_wrapper(value):
        return "wrapt"
    if is_mock(value):
        return "mock"
    if type(value) is types.FunctionType:
        return _form_of_function(value)
    return next((form for kinds, form in _FORMS if issubclass(type(value), kinds)), "object")


def _form_of_function(function: types.FunctionType) -> str:
    if function.__code__.co_name == "<lambda>":
        return "lambda"
    return "wraps" if "__wrapped__" in vars(function) else "function"


_FORMS: Final[Sequence[tuple[tuple[type, ...], str]]] = (
    ((functools.partial, functools.partialmethod), "partial"),
    ((type,), "class"),
    ((types.ModuleType,), "module"),
    ((types.BuiltinFunctionType, types.MethodDescriptorType), "builtin"),
)
