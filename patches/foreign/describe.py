"""Descriptions: a text for any object that holds code, equal in all processes with the same code.

Two objects with equal descriptions run the same code: a description names the file and line of every function
involved (decorators, wrappers, functions in a closure), and the default arguments. The described object is never
called, and no attribute is read that could be computed.
"""

from __future__ import annotations

import enum
import functools
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

__all__ = ["DATA", "class_name", "describe", "is_mock", "is_wrapt_wrapper", "parts", "without_defaults"]

DATA: Final = ""
"""The description of every object without code: values may legitimately differ between processes."""

_MAX_DEPTH: Final = 6
_LONGEST_VALUE: Final = 80
_DEFAULTS: Final = re.compile(r"\{[^{}]*\}")
_COUNTER: Final = re.compile(r"\d+")

# By name: the module is `_wrappers` for the compiled classes, and another one in a library's vendored copy.
_WRAPT: Final = {"FunctionWrapper", "_FunctionWrapperBase"}

# Read directly, bypassing overrides by a class or metaclass.
_MODULE_OF: Final = type.__dict__["__module__"]
_QUALNAME_OF: Final = type.__dict__["__qualname__"]
_NAMESPACE_OF: Final[Any] = vars(types.ModuleType)["__dict__"]

_C_FUNCTIONS: Final = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


def describe(value: Any, depth: int = 0) -> str:
    """Describe the code of `value`; DATA if it has none."""
    if depth > _MAX_DEPTH:
        return "..."
    kind = type(value)
    if kind is types.FunctionType:
        return _describe_function(value, depth)
    if kind in _C_FUNCTIONS:
        return f"builtin {getattr(value, '__module__', None) or ''}.{value.__qualname__}"
    if issubclass(kind, type):
        return f"class {class_name(value)}"
    if issubclass(kind, types.ModuleType):
        return f"module {_NAMESPACE_OF.__get__(value).get('__name__')}"
    return _describe_object(value, depth)


def parts(value: Any) -> Sequence[Any]:
    """The callables inside `value`, outermost first, if it is of a kind that wraps others."""
    find = _PARTS.get(type(value))
    if find is not None:
        return find(value)
    if is_wrapt_wrapper(value):
        return value._self_wrapper, value.__wrapped__
    return _wrapped_by_object(value) if _has(type(value), "__call__") else ()


def class_name(cls: type) -> str:
    """`module.Qualified.Name`."""
    module = _MODULE_OF.__get__(cls)
    return f"{module if isinstance(module, str) else '?'}.{_QUALNAME_OF.__get__(cls)}"


def is_wrapt_wrapper(value: Any) -> bool:
    """Whether the value is a function wrapper of wrapt, or of a library's vendored copy of it."""
    return {base.__name__ for base in type(value).__mro__} >= _WRAPT


def is_mock(value: Any) -> bool:
    """Whether the value is a mock of unittest.mock, or of the `mock` package."""
    modules = (_MODULE_OF.__get__(base) for base in type(value).__mro__)
    return any(module in ("unittest.mock", "mock.mock") for module in modules)


def without_defaults(description: str) -> str:
    """The description without its default arguments."""
    return _DEFAULTS.sub("", description)


def _describe_object(value: Any, depth: int) -> str:
    kind = type(value)
    inner = [describe(part, depth + 1) for part in parts(value)]
    if inner:
        return f"{kind.__name__}({', '.join(inner)}{_arguments(value)})"
    if is_mock(value) or _has(kind, "__call__") or _has(kind, "__get__"):
        return f"object of {class_name(kind)}"
    return DATA


def _describe_function(function: types.FunctionType, depth: int) -> str:
    code = function.__code__
    file, line, name = code.co_filename, code.co_firstlineno, code.co_qualname
    if file.startswith("<"):
        # Generated functions have no lines to tell them apart, and their file names may contain counters.
        file, line, name = _COUNTER.sub("", file), 0, function.__qualname__
    around = [describe(value, depth + 1) for value in (*parts(function), *_enclosed(function))]
    inside = f" around ({', '.join(around)})" if around else ""
    return f"function {name} at {file}:{line}{_defaults(function)}{inside}"


def _enclosed(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions in a closure, where a decorator without `functools.wraps` keeps the wrapped function."""
    wrapped = vars(function).get("__wrapped__")
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if type(held) is types.FunctionType and held is not wrapped and held is not function:
            yield held


def _defaults(function: types.FunctionType) -> str:
    given = [_text(value) for value in function.__defaults__ or ()]
    given += [f"{name}={_text(value)}" for name, value in sorted((function.__kwdefaults__ or {}).items())]
    return "{" + ", ".join(given).replace("{", "(").replace("}", ")") + "}" if given else ""


def _arguments(value: Any) -> str:
    if type(value) not in (functools.partial, functools.partialmethod):
        return ""
    named = [f"{name}={_text(argument)}" for name, argument in sorted(value.keywords.items())]
    return "".join(f"; {argument}" for argument in [*map(_text, value.args), *named])


def _text(value: Any) -> str:
    """The text of a default value, limited to parts that are equal in every process."""
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes, types.EllipsisType):
        return repr(value)[:_LONGEST_VALUE]
    if kind in (tuple, list):
        return f"({', '.join(map(_text, value))})"
    if issubclass(kind, enum.Enum):
        return f"{class_name(kind)}.{value._name_}"
    if kind is types.FunctionType:
        return f"{value.__code__.co_filename}:{value.__code__.co_firstlineno}"
    return class_name(value) if issubclass(kind, type) else f"<{class_name(kind)}>"


def _wrapped_by_function(function: types.FunctionType) -> Sequence[Any]:
    attributes = vars(function)
    return (attributes["__wrapped__"],) if "__wrapped__" in attributes else ()


def _wrapped_by_object(value: Any) -> Sequence[Any]:
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return ()
    return (attributes["__wrapped__"],) if isinstance(attributes, dict) and "__wrapped__" in attributes else ()


def _has(kind: type, method: str) -> bool:
    return any(method in base.__dict__ for base in kind.__mro__)


_PARTS: Final[dict[type, Callable[[Any], Sequence[Any]]]] = {
    types.FunctionType: _wrapped_by_function,
    types.MethodType: lambda method: (method.__func__,),
    staticmethod: lambda method: (method.__func__,),
    classmethod: lambda method: (method.__func__,),
    property: lambda accessors: (accessors.fget, accessors.fset, accessors.fdel),
    functools.cached_property: lambda cached: (cached.func,),
    functools.partial: lambda partial: (partial.func,),
    functools.partialmethod: lambda partial: (partial.func,),
    type(functools.lru_cache(lambda: None)): lambda cached: (cached.__wrapped__,),
}
