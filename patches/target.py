"""Targets: the text `package.module:Class.attribute`, the place it names, whether that can be patched."""

from __future__ import annotations

import enum
import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from .errors import TargetError

__all__ = ["MISSING", "Kind", "Missing", "Place", "Target", "describe", "locate", "parse", "read_own"]

_DOTTED: Final = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_TARGET: Final = re.compile(rf"({_DOTTED}):({_DOTTED})")

# CPython refuses to set attributes of a type with this flag (Py_TPFLAGS_IMMUTABLETYPE): int, most C types.
_IMMUTABLE_TYPE: Final = 1 << 8


class Missing(enum.Enum):
    """The type of `MISSING`, which stands for an attribute that is in no `__dict__` (None is a value)."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "<missing>"


MISSING: Final = Missing.MISSING


class Kind(enum.StrEnum):
    """How a target is stored, which decides what a wrapper is turned into."""

    FUNCTION = "function"
    METHOD = "method"
    CLASSMETHOD = "classmethod"
    STATICMETHOD = "staticmethod"
    PROPERTY = "property"
    ATTRIBUTE = "attribute"
    """Values that instances store under this name; nothing needs to be on the class."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parsed target: the module, and the path to the attribute inside it."""

    module: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}:{'.'.join(self.path)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a target lives: one attribute of one module or class, as it is now."""

    target: str
    owner: ModuleType | type
    name: str
    kind: Kind
    own: Any
    """What `owner.__dict__` holds, descriptors not bound; MISSING for an inherited or absent attribute."""
    found: Any
    """What the attribute is, looked up in the bases too, descriptors not bound; MISSING if absent."""

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the slot. Valid while `owner` is alive, which whoever keeps the key must see to."""
        return id(self.owner), self.name


def parse(text: str) -> Target:
    """Split `package.module:Class.attribute`; raises TargetError where `text` is not of that form."""
    match = _TARGET.fullmatch(text)
    if match is None:
        raise _refuse(text, "it is not of the form 'package.module:Class.attribute'")
    return Target(module=match[1], path=tuple(match[2].split(".")))


def read_own(owner: ModuleType | type, name: str) -> Any:
    """`owner.__dict__[name]`, or MISSING: never bound, never inherited, no `__getattr__`."""
    return owner.__dict__.get(name, MISSING)


def locate(text: str) -> tuple[ModuleType | type, str]:
    """Import the target's module and find the owner of the attribute, and its name there.

    Raises TargetError where the target does not lead to a module or class that Python lets attributes be set
    on.
    """
    target = parse(text)
    owner = _find_owner(target)
    if isinstance(owner, type) and owner.__flags__ & _IMMUTABLE_TYPE:
        raise _refuse(text, f"{_name(owner)} is an immutable type; patch what calls it instead")
    return owner, target.path[-1]


def describe(text: str, owner: ModuleType | type, name: str, kind: str = "auto") -> Place:
    """What is at the place that `text` leads to. `kind` is "auto" or the `Kind` that the caller expects.

    Raises TargetError where the attribute does not exist, is of another kind, or cannot be wrapped. Changes
    nothing.
    """
    if kind == Kind.ATTRIBUTE:
        return _attribute_place(text, owner, name)
    found = _find(owner, name)
    if found is MISSING:
        raise _refuse(text, f"{_name(owner)} has no attribute {name!r}")
    actual = _kind_of(text, owner, name, found)
    if kind not in ("auto", actual):
        raise _refuse(text, f"its kind is {actual.value!r}, and the patch says {kind!r}")
    return Place(target=text, owner=owner, name=name, kind=actual, own=read_own(owner, name), found=found)


def _find_owner(target: Target) -> ModuleType | type:
    try:
        found: Any = importlib.import_module(target.module)
    except Exception as error:  # a module may raise anything while it is imported
        raise _refuse(str(target), f"importing {target.module!r} raised {error!r}") from error
    for part in target.path[:-1]:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise _refuse(str(target), f"{_name(found)} has no attribute {part!r}") from error
    if not isinstance(found, ModuleType | type):
        raise _refuse(str(target), f"{_name(found)} is neither a module nor a class")
    return found


def _find(owner: ModuleType | type, name: str) -> Any:
    if isinstance(owner, type):
        return next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), MISSING)
    # Modules may create attributes on first access (PEP 562), usually storing them: ask before looking.
    return getattr(owner, name, MISSING)


def _attribute_place(text: str, owner: ModuleType | type, name: str) -> Place:
    if not isinstance(owner, type):
        raise _refuse(text, "kind 'attribute' is for what instances of a class store, and this is a module")
    if owner.__dictoffset__ == 0:
        raise _refuse(text, f"instances of {_name(owner)} have no __dict__ to store an attribute in")
    found = _find(owner, name)
    if hasattr(type(found), "__set__"):
        raise _refuse(text, f"it is a {type(found).__name__}, which stores the value itself; patch that instead")
    own = read_own(owner, name)
    return Place(target=text, owner=owner, name=name, kind=Kind.ATTRIBUTE, own=own, found=found)


def _kind_of(text: str, owner: ModuleType | type, name: str, found: Any) -> Kind:
    if name in ("__new__", "__init__") and found is vars(object)[name]:
        # object's own refuse arguments as soon as a class has one of the two, or has had a __new__.
        raise _refuse(text, f"{_name(owner)} has only the {name} of object; patch what creates its instances")
    if isinstance(found, type):
        raise _refuse(text, "it is a class; patch its methods, __init__ or __new__ instead")
    if isinstance(owner, ModuleType):
        if callable(found):
            return Kind.FUNCTION
        raise _refuse(text, f"it is a {type(found).__name__}, which cannot be called and so cannot be wrapped")
    # Subclasses of these may bind in ways of their own, which rebuilding them would lose. `__class__`, not
    # `type`: a wrapt proxy around a classmethod, ours or somebody else's, answers as what it wraps.
    for kind, builtin in _DESCRIPTORS.items():
        if found.__class__ is builtin:
            return _readable(text, kind, found)
    if callable(found) and hasattr(type(found), "__get__") and not isinstance(found, _DESCRIPTOR_TYPES):
        return Kind.METHOD
    raise _refuse(text, f"it is a {type(found).__name__}, neither a method nor a plain property")


def _readable(text: str, kind: Kind, found: Any) -> Kind:
    if kind == Kind.PROPERTY and found.fget is None:
        raise _refuse(text, "it is a property without a getter, so no read can be wrapped")
    return kind


_DESCRIPTORS: Final = {
    Kind.CLASSMETHOD: classmethod,
    Kind.STATICMETHOD: staticmethod,
    Kind.PROPERTY: property,
}
_DESCRIPTOR_TYPES: Final = tuple(_DESCRIPTORS.values())


def _refuse(text: str, why: str) -> TargetError:
    return TargetError(f"cannot patch {text!r}: {why}", target=text, why=why)


def _name(value: object) -> str:
    if isinstance(value, ModuleType):
        return f"module {value.__name__!r}"
    if isinstance(value, type):
        return f"class {value.__qualname__!r}"
    return f"an object of type {type(value).__name__!r}"
