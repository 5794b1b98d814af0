"""Origins: the file and line where the code behind a value was defined, and the distribution that owns it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..versions import owner_of
from .describe import class_name, parts
from .walk import belongs, folders_of, namespace

__all__ = ["Origin", "origins"]

_MAX_DEPTH: Final = 8


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of one function in a value: of a wrapper, or of a function that it leads to."""

    module: str
    """The module whose globals the code uses, whatever `__module__` says."""
    at: str
    """`file:line`; `module.name` for code without a file."""

    def is_in(self, package: str) -> bool:
        """Whether the package defines the code, judged by the module, and by the file if there is one."""
        if not belongs(self.module, package):
            return False
        folders = folders_of(package)
        return not folders or not Path(self.at).is_absolute() or self.at.startswith(folders)

    @property
    def owner(self) -> str:
        """The module's distribution and version; Python's own for the standard library; empty if neither."""
        package = self.module.partition(".")[0]
        if package in sys.stdlib_module_names or package in sys.builtin_module_names:
            return f"Python {sys.version.partition(' ')[0]}"
        owner = owner_of(package)
        return "" if owner == package else owner


def origins(value: Any, depth: int = 0) -> Iterator[Origin]:
    """The origins of a value, outermost first; none for a value without code."""
    if depth > _MAX_DEPTH or value is None:
        return
    kind = type(value)
    if kind is types.FunctionType:
        code = value.__code__
        module = value.__globals__.get("__name__") or "?"
        yield Origin(module=module, at=f"{code.co_filename}:{code.co_firstlineno}")
    inner = parts(value)
    for part in inner:
        yield from origins(part, depth + 1)
    if kind is not types.FunctionType and not inner:
        yield _origin_of_leaf(value)


def _origin_of_leaf(value: Any) -> Origin:
    kind = type(value)
    if issubclass(kind, type):
        return _origin_of_class(value)
    if issubclass(kind, types.ModuleType):
        held = namespace(value)
        return Origin(module=str(held.get("__name__")), at=str(held.get("__file__") or held.get("__name__")))
    if kind in (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType):
        module = getattr(value, "__module__", None) or "builtins"
        return Origin(module=module, at=f"{module}.{value.__qualname__}")
    return _origin_of_class(kind)


def _origin_of_class(cls: type) -> Origin:
    module = class_name(cls)[: -len(cls.__qualname__) - 1]
    methods = (entry for entry in vars(cls).values() if type(entry) is types.FunctionType)
    lines = [method.__code__.co_firstlineno for method in methods if method.__globals__.get("__name__") == module]
    file = namespace(sys.modules.get(module)).get("__file__")
    line = vars(cls).get("__firstlineno__") or min(lines, default=1)  # the former since Python 3.13
    return Origin(module=module, at=f"{file}:{line}" if file else class_name(cls))
