"""Walk over every place in a package's loaded modules that can hold code. Imports and computes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from .describe import class_name

__all__ = ["Binding", "belongs", "bindings", "folders_of", "loaded", "namespace"]

# Bypasses attributes that a subclass of the module type computes.
_NAMESPACE_OF: Final[Any] = vars(ModuleType)["__dict__"]
_IMMUTABLE_TYPE: Final = 1 << 8
# Set by the import system, so the values differ between processes.
_SKIPPED: Final = frozenset({"__builtins__", "__loader__", "__spec__"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """One entry in the namespace of a module, class or dictionary, with its value."""

    owner: str
    """`package.module` or `package.module:Class`; for an item, the holder of the dictionary."""
    name: str
    """Name of the entry; empty for the module itself."""
    value: Any
    in_class: bool = False
    is_item: bool = False

    @property
    def path(self) -> str:
        """`package.module:Class.attribute`, the syntax of targets."""
        if not self.name:
            return self.owner
        if self.is_item:
            return f"{self.owner}[{self.name!r}]"
        return f"{self.owner}.{self.name}" if self.in_class else f"{self.owner}:{self.name}"


def belongs(module: str, package: str) -> bool:
    """Whether the module is the package itself or inside it."""
    return module == package or module.startswith(f"{package}.")


def loaded(package: str) -> list[str]:
    """The names of the package's modules that are loaded, in the order of their import."""
    modules: dict[str, Any] = sys.modules.copy()  # None stands for a module that may not be imported
    return [name for name, module in modules.items() if module is not None and belongs(name, package)]


def namespace(module: Any) -> dict[str, Any]:
    """A copy of a module's namespace; empty for an object that only imitates a module."""
    return dict(_NAMESPACE_OF.__get__(module)) if issubclass(type(module), ModuleType) else {}


def folders_of(package: str) -> tuple[str, ...]:
    """The folders of the package's files, each with a trailing separator; for a single module, its file."""
    held = namespace(sys.modules.get(package))
    folders = tuple(os.path.join(folder, "") for folder in held.get("__path__", ()))  # noqa: PTH118 - as in code objects
    return folders or ((held["__file__"],) if held.get("__file__") else ())


def bindings(package: str) -> Iterator[Binding]:
    """Every binding of the package; a class with several names is visited once."""
    seen: set[type] = set()
    for module_name in loaded(package):
        module = sys.modules.get(module_name)
        yield Binding(owner=module_name, name="", value=module)
        for name, value in namespace(module).items():
            if name in _SKIPPED:
                continue
            yield Binding(owner=module_name, name=name, value=value)
            if type(value) is dict:
                yield from _items(f"{module_name}:{name}", value)
            elif issubclass(type(value), type):
                yield from _members(value, package, seen)


def _members(cls: type, package: str, seen: set[type]) -> Iterator[Binding]:
    if cls in seen or cls.__flags__ & _IMMUTABLE_TYPE or not belongs(class_name(cls), package):
        return
    seen.add(cls)
    owner = f"{type.__dict__['__module__'].__get__(cls)}:{type.__dict__['__qualname__'].__get__(cls)}"
    for name, value in dict(cls.__dict__).items():
        yield Binding(owner=owner, name=name, value=value, in_class=True)
        if type(value) is dict:
            yield from _items(f"{owner}.{name}", value)
        elif issubclass(type(value), type):
            yield from _members(value, package, seen)


def _items(owner: str, registry: dict[Any, Any]) -> Iterator[Binding]:
    for key, value in registry.copy().items():
        if type(key) is str:
            yield Binding(owner=owner, name=key, value=value, is_item=True)
