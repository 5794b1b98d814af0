"""Targets: the place named by `package.module:Class.attribute`, and whether it can be patched."""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import MutableMapping, MutableSequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Final

from .address import Target, parse, refuse
from .cell import MISSING, AttributeCell, Cell, DefaultCell, ItemCell, Missing, has_default

__all__ = [
    "MISSING",
    "Kind",
    "Missing",
    "Place",
    "Target",
    "accept",
    "describe",
    "is_orphaned",
    "locate",
    "parse",
    "rehearse",
]

# CPython does not allow setting attributes of a type with this flag (Py_TPFLAGS_IMMUTABLETYPE): int, most C types.
_IMMUTABLE_TYPE: Final = 1 << 8


class Kind(enum.StrEnum):
    """The kind of a target, which determines the form of the installed object."""

    FUNCTION = "function"
    METHOD = "method"
    CLASSMETHOD = "classmethod"
    STATICMETHOD = "staticmethod"
    PROPERTY = "property"
    """Reads of a property."""
    SETTER = "setter"
    """Writes of a property: the wrapper gets `(value,)`. Never chosen by "auto"."""
    ATTRIBUTE = "attribute"
    """Values that instances store under this name; the class need not have the attribute."""
    VALUE = "value"
    """The stored value itself: a constant, an item, a default argument. The wrapper is called once, when the patch
    is applied, with only `wrapped()`, which returns the current value; its result replaces that value. "auto"
    chooses this kind for default arguments alone, since wrappers of other kinds run on each call.
    """
    CLASS = "class"
    """A class, replaced in the manner of VALUE: the wrapper returns another class, usually a subclass of
    `wrapped()`. Existing instances and subclasses keep the old class; to change those too, patch its methods.
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """The place of a target, and its current content."""

    target: str
    owner: Any
    """The module, class or other object; for an item its container, for a default argument its function."""
    name: str
    kind: Kind
    """Kind of the place; never SETTER, since getter and setter of a property are one place of kind PROPERTY."""
    cell: Cell
    own: Any
    """Content of the cell, without binding descriptors; MISSING for an inherited or absent attribute."""
    found: Any
    """Value of the attribute, looked up in the bases too, without binding descriptors; MISSING if absent."""

    @property
    def key(self) -> tuple[int, str]:
        """The key of the slot. Valid while `owner` is alive, which the holder of the key must ensure."""
        return id(self.owner), self.name


def locate(text: str) -> tuple[Any, str]:
    """Import the target's module, and return the target's owner and its name there.

    Raises TargetError if the target does not resolve, or Python does not allow changing it.
    """
    target = parse(text)
    try:
        module = importlib.import_module(target.module)
    except Exception as error:  # a module may raise anything on import
        raise refuse(text, f"importing {target.module!r} raised {error!r}") from error
    return _owner(text, target, module), target.name


def is_orphaned(place: Place) -> bool:
    """Whether the target's text now resolves to another owner, such as the new class of a reloaded module."""
    target = parse(place.target)
    module = sys.modules.get(target.module)
    try:
        return module is None or _owner(place.target, target, module) is not place.owner
    except Exception:  # noqa: BLE001 - importing may raise anything; then the owner is gone
        return True


def describe(text: str, owner: Any, name: str, kind: str = "auto") -> Place:
    """Describe the place that `text` names. `kind` is "auto" or the `Kind` that the caller expects.

    Raises TargetError if the place is empty, is of another kind, or cannot be wrapped. Changes nothing.
    """
    target = parse(text)
    cell, found = _cell(target, owner, name), _find(target, owner, name)
    if kind == Kind.ATTRIBUTE:
        _check_attribute(text, owner, found)
    elif found is MISSING:
        missing = f"attribute {name!r}" if target.key is MISSING else f"item {name}"
        raise refuse(text, f"{_name(owner)} has no {missing}")
    actual = _kind_of(text, target, owner, found, kind)
    place = Place(target=text, owner=owner, name=name, kind=actual, cell=cell, own=cell.read(), found=found)
    accept(text, place, kind)
    return place


def accept(text: str, place: Place, kind: str) -> None:
    """Raise TargetError if the place, patched already or not, cannot take a patch of this kind."""
    expected = Kind.PROPERTY if kind == Kind.SETTER else kind
    implied = place.kind not in (Kind.VALUE, Kind.CLASS, Kind.ATTRIBUTE) or isinstance(place.cell, DefaultCell)
    if expected != place.kind and not (expected == "auto" and implied):
        raise refuse(text, f"its kind is {place.kind.value!r}, and the patch says {kind!r}")
    if place.kind != Kind.PROPERTY:
        return
    if kind == Kind.SETTER and place.found.fset is None:
        raise refuse(text, "it is a property without a setter, so no write can be wrapped")
    if kind != Kind.SETTER and place.found.fget is None:
        raise refuse(text, "it is a property without a getter, so no read can be wrapped")


def _owner(text: str, target: Target, module: ModuleType) -> Any:
    found: Any = module
    for part in target.owner_path:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise refuse(text, f"{_name(found)} has no attribute {part!r}") from error
    if target.parameter is not None:
        return _function_with_default(text, found, target.parameter)
    if target.key is not MISSING:
        return _container(text, found)
    if isinstance(found, type) and found.__flags__ & _IMMUTABLE_TYPE:
        raise refuse(text, f"{_name(found)} is an immutable type; patch what calls it instead")
    if not hasattr(found, "__dict__"):
        why = "is neither a module nor a class, and has no __dict__ to set an attribute in"
        raise refuse(text, f"{_name(found)} {why}")
    return found


def _container(text: str, found: Any) -> Any:
    if not isinstance(found, MutableMapping | MutableSequence):
        raise refuse(text, f"{_name(found)} is not a dictionary or list whose items can be set")
    return found


def _function_with_default(text: str, found: Any, parameter: str) -> FunctionType:
    inner = found
    while inner is not None:  # through all wrappers, including our own patches
        if type(inner) is FunctionType and has_default(inner, parameter):
            return inner
        inner = getattr(inner, "__wrapped__", None) or getattr(inner, "__func__", None)
    raise refuse(text, f"{_name(found)} is not a Python function with a default for {parameter!r}")


def _cell(target: Target, owner: Any, name: str) -> Cell:
    if target.parameter is not None:
        return DefaultCell(owner, target.parameter)
    return AttributeCell(owner, name) if target.key is MISSING else ItemCell(owner, target.key)


def _find(target: Target, owner: Any, name: str) -> Any:
    if target.owner_path == target.path:
        return _cell(target, owner, name).read()
    if isinstance(owner, type):
        return next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), MISSING)
    # Modules may create attributes on first access (PEP 562) and usually store them, so access before looking. A
    # method of another object is returned bound.
    return getattr(owner, name, MISSING)


def _check_attribute(text: str, owner: Any, found: Any) -> None:
    if not isinstance(owner, type):
        what = "a module" if isinstance(owner, ModuleType) else "no class"
        raise refuse(text, f"kind 'attribute' is for what instances of a class store, and this is {what}")
    if owner.__dictoffset__ == 0:
        raise refuse(text, f"instances of {_name(owner)} have no __dict__ to store an attribute in")
    if hasattr(type(found), "__set__"):
        raise refuse(text, f"it is a {type(found).__name__}, which stores the value itself; patch that instead")


def _kind_of(text: str, target: Target, owner: Any, found: Any, kind: str) -> Kind:
    if not isinstance(owner, type | ModuleType) and target.owner_path != target.path:
        _check_object(text, target, owner)
    if target.parameter is not None or kind in (Kind.ATTRIBUTE, Kind.VALUE):
        return Kind.VALUE if kind != Kind.ATTRIBUTE else Kind.ATTRIBUTE
    if kind == Kind.CLASS and not isinstance(found, type):
        raise refuse(text, f"it is an object of type {type(found).__name__!r}, and the patch says 'class'")
    if isinstance(found, type):
        if kind == Kind.CLASS:
            return Kind.CLASS
        raise refuse(text, 'it is a class; patch its methods, __init__ or __new__ instead, or say kind="class"')
    if isinstance(owner, type):
        return _kind_in_class(text, owner, target.path[-1], found)
    if callable(found):
        return Kind.FUNCTION
    why = "which cannot be called and so cannot be wrapped"
    raise refuse(text, f'it is a {type(found).__name__}, {why}; to replace it, say kind="value"')


def _kind_in_class(text: str, owner: type, name: str, found: Any) -> Kind:
    if name in ("__new__", "__init__") and found is vars(object)[name]:
        # object's own methods refuse arguments once a class defines one of the two, or has ever had a __new__.
        raise refuse(text, f"{_name(owner)} has only the {name} of object; patch what creates its instances")
    # Subclasses of these may bind in their own way, which rebuilding would lose. `__class__`, not `type`: a wrapt
    # proxy around a classmethod, ours or somebody else's, has the `__class__` of the wrapped object.
    for kind, builtin in _DESCRIPTORS.items():
        if found.__class__ is builtin:
            return kind
    if callable(found) and hasattr(type(found), "__get__") and not isinstance(found, _DESCRIPTOR_TYPES):
        return Kind.METHOD
    why = f'it is a {type(found).__name__}, neither a method nor a plain property; to replace it, say kind="value"'
    raise refuse(text, why)


def _check_object(text: str, target: Target, owner: Any) -> None:
    """Raise TargetError for an attribute that would not be stored in the `__dict__` of the object when set."""
    name = target.path[-1]
    on_class = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), MISSING)
    if hasattr(type(on_class), "__set__"):
        raise refuse(text, f"it is a {type(on_class).__name__} of {_name(type(owner))}; patch it there")
    if on_class is MISSING and name not in vars(owner):
        raise refuse(text, f"it is neither in the __dict__ of {_name(owner)} nor on its class")


def rehearse(place: Place) -> None:
    """Raise TargetError if the owner's own `__setattr__`, such as that of a metaclass, rejects a change.

    Tried by setting the current value again; a plain `__setattr__` is not tried.
    """
    setter: object = type(place.owner).__setattr__
    plain = setter in (type.__setattr__, object.__setattr__, ModuleType.__setattr__)
    if plain or place.found is MISSING or not isinstance(place.cell, AttributeCell):
        return
    try:
        place.cell.write(place.found)
        stored = place.cell.read()
        if place.own is MISSING and stored is not MISSING:
            place.cell.write(MISSING)
    except Exception as error:  # a foreign `__setattr__` may raise anything
        why = f"{type(place.owner).__qualname__}.__setattr__ does not let it be set: {error!r}"
        raise refuse(place.target, why) from error
    if stored is not place.found:
        raise refuse(place.target, f"{type(place.owner).__qualname__}.__setattr__ stores it elsewhere")


_DESCRIPTORS: Final = {
    Kind.CLASSMETHOD: classmethod,
    Kind.STATICMETHOD: staticmethod,
    Kind.PROPERTY: property,
}
_DESCRIPTOR_TYPES: Final = tuple(_DESCRIPTORS.values())


def _name(value: object) -> str:
    if isinstance(value, ModuleType):
        return f"module {value.__name__!r}"
    if isinstance(value, type):
        return f"class {value.__qualname__!r}"
    return f"an object of type {type(value).__name__!r}"
