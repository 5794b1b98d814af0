"""Targets: the place named by `package.module:Class.attribute`, what is stored there, and whether it can be patched."""

from __future__ import annotations

import ast
import contextlib
import enum
import importlib
import operator
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, ClassMethodDescriptorType, FunctionType, ModuleType
from typing import Any, Final
from weakref import WeakKeyDictionary

from .errors import TargetError

__all__ = [
    "MISSING", "STORED", "Kind", "Missing", "Place", "Target", "accept", "at",
    "describe", "locate", "owner_now", "parse", "put_back", "refuse", "rehearse",
]  # fmt: skip

_DOTTED: Final = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_TARGET: Final = re.compile(rf"({_DOTTED}):({_DOTTED})(?:\[(?P<key>.+)\]|\((?P<parameter>[^\W\d]\w*)\))?")
# CPython does not allow setting attributes of a type with this flag (Py_TPFLAGS_IMMUTABLETYPE): int, most C types.
_IMMUTABLE_TYPE: Final = 1 << 8


class Missing(enum.Enum):
    """The type of `MISSING`, which marks an attribute or item that is not there (None is a value)."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "<missing>"


MISSING: Final = Missing.MISSING


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
    chooses this kind for default arguments and for a `replace=` that cannot be called, since wrappers of other kinds
    run on each call.
    """
    CLASS = "class"
    """A class, replaced in the manner of VALUE: the wrapper returns another class, usually a subclass of
    `wrapped()`. Existing instances and subclasses keep the old class; to change those too, patch its methods.
    """
    ADD = "add"
    """An attribute or item that is not there yet, such as `os:environ[NAME]`; undoing deletes it again."""
    DELETE = "delete"
    """An attribute or item that is to be absent; undoing puts it back."""


#: Kinds that replace what is stored, for every reader alike.
STORED: Final = frozenset({Kind.VALUE, Kind.CLASS, Kind.ADD, Kind.DELETE})


# What is named --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parsed target: the module or the object in hand, and the path from it to what is patched."""

    module: str
    path: tuple[str, ...]
    text: str = field(default="", compare=False)
    """The target as it was written."""
    key: Any = MISSING
    """The key of an item target, `module:path[key]`."""
    parameter: str | None = None
    """The parameter of a default argument target, `module:path(parameter)`."""
    held: Any = field(default=MISSING, compare=False)
    """The object in hand that has the attribute `path[-1]`, as given to `at`."""

    @property
    def owner_path(self) -> tuple[str, ...]:
        """The path to the owner of the target: a module or class, a container, a function."""
        is_attribute = self.key is MISSING and self.parameter is None
        return self.path[:-1] if is_attribute else self.path

    @property
    def is_attribute(self) -> bool:
        """Whether an attribute is meant, and not an item or a default argument."""
        return self.owner_path != self.path

    @property
    def name(self) -> str:
        """The name of the target within its owner: an attribute, `[key]` or `(parameter)`."""
        if self.parameter is not None:
            return f"({self.parameter})"
        return self.path[-1] if self.key is MISSING else f"[{self.key!r}]"

    def __str__(self) -> str:
        return self.text or f"{self.module}:{'.'.join(self.path)}{'' if self.is_attribute else self.name}"


def parse(text: str) -> Target:
    """Split `package.module:Class.attribute`, `...:TABLE[key]`, or `...:function(parameter)`.

    A key is a Python literal, or else is taken as a string: `[3]`, `['3']`, `[relu]`. Raises TargetError if
    `text` has none of these forms.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        forms = "'package.module:Class.attribute', nor with [key] or (parameter) after it"
        suggestion = _with_colon(text)
        raise refuse(
            text, f"it is not of the form {forms}", suggestion=suggestion if _TARGET.fullmatch(suggestion) else ""
        )
    key = MISSING if match["key"] is None else _literal(match["key"])
    path = tuple(match[2].split("."))
    return Target(module=match[1], path=path, text=text, key=key, parameter=match["parameter"])


def at(owner: object, name: str) -> Target:
    """Name an attribute of an object in hand, for `Patch(target=...)`: a module, a class, or any other object.

    The patch keeps the object alive.
    """
    if isinstance(owner, ModuleType):
        return Target(module=owner.__name__, path=(name,), held=owner)
    kind = owner if isinstance(owner, type) else type(owner)
    return Target(module=kind.__module__, path=(*kind.__qualname__.split("."), name), held=owner)


def refuse(target: object, why: str, *, suggestion: str = "", is_absent: bool = False) -> TargetError:
    """The error for a target that cannot be patched."""
    hint = f"; did you mean {suggestion!r}?" if suggestion else ""
    message = f"cannot patch {str(target)!r}: {why}{hint}"
    return TargetError(message, target=str(target), why=why, suggestion=suggestion, is_absent=is_absent)


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _with_colon(text: str) -> str:
    """The dotted name with a colon before its first class, or else before its last part."""
    head, bracket, tail = text.partition("[" if "[" in text else "(")
    parts = head.replace(":", ".").split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return ""
    first = next((index for index, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1) or 1
    return f"{'.'.join(parts[:first])}:{'.'.join(parts[first:])}{bracket}{tail}"


def _alike(target: Target, wrong: str, names: Iterable[str]) -> str:
    """The target with the name most similar to `wrong` in its place, or ""."""
    import difflib

    close = difflib.get_close_matches(wrong, list(names), n=1)
    return str(target).replace(wrong, close[0], 1) if close else ""


# What is stored -------------------------------------------------------------------------------------------------------


class _Attribute:
    """An entry of the `__dict__` of a module, class, or other object: never bound, never inherited.

    `write` stores by `setattr`, and deletes for MISSING. A descriptor is told its name, as in a class body.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name
        self._after: tuple[str, ...] = ()

    def read(self) -> Any:
        return self._owner.__dict__.get(self._name, MISSING)

    def write(self, value: Any) -> None:
        entries = self._owner.__dict__
        if value is MISSING:
            self._after = _keys_after(entries, self._name)
            delattr(self._owner, self._name)
            return
        was_there = self._name in entries
        setattr(self._owner, self._name, value)
        if isinstance(self._owner, type) and hasattr(type(value), "__set_name__"):
            type(value).__set_name__(value, self._owner, self._name)
        if not was_there and type(entries) is dict:
            _move_to_end(entries, self._after)
        self._after = ()


class _Item:
    """An item of a dictionary or a list. The items of a dictionary keep their order.

    A mapping of several layers (`ChainMap`, the registries of transformers) has the item only if its first layer has:
    undoing deletes what was added there, so that a later change of a lower layer shows.
    """

    def __init__(self, container: MutableMapping[Any, Any] | MutableSequence[Any], key: Any) -> None:
        self._container = container
        self._key = key
        self._after: tuple[Any, ...] = ()
        self._texts: list[str] = []

    def read(self) -> Any:
        layers = _first_layers(self._container)
        return self.find() if not layers or any(self._key in layer for layer in layers) else MISSING

    def find(self) -> Any:
        """Read the item, whichever layer of the mapping has it; never creates one, as a `defaultdict` would."""
        if isinstance(self._container, MutableMapping):
            return self._same(self._container.get(self._key, MISSING))
        in_range = isinstance(self._key, int) and 0 <= self._key < len(self._container)
        return self._container[self._key] if in_range else MISSING

    def _same(self, held: Any) -> Any:
        """The string that was read or written before, if it is equal: `os.environ` makes a new one for each read."""
        if type(held) is not str or isinstance(self._container, dict):
            return held
        self._texts.append(held)
        return self._texts[self._texts.index(held)]

    def write(self, value: Any) -> None:
        self._texts = [value, *self._texts] if type(value) is str else self._texts
        plain: Any = self._container if isinstance(self._container, dict) else None
        if value is MISSING:
            self._after = _keys_after(plain or {}, self._key)
            del self._container[self._key]
            return
        was_there = plain is not None and self._key in plain
        self._container[self._key] = value
        if plain is not None and not was_there:
            _move_to_end(plain, self._after)
        self._after = ()


def _first_layers(container: Any) -> list[Mapping[Any, Any]]:
    """The dictionaries in which a mapping keeps items of its own; empty if it is a dictionary, or keeps none."""
    if isinstance(container, ChainMap):
        return [container.maps[0]]
    if isinstance(container, dict) or not isinstance(container, MutableMapping):
        return []
    kept = [held for held in getattr(container, "__dict__", {}).values() if isinstance(held, dict)]
    try:
        return [held for held in kept if all(key in container for key in held)]
    except TypeError:  # keys of another form, as those of os.environ, which are encoded
        return []


def _keys_after(entries: Mapping[Any, Any], key: Any) -> tuple[Any, ...]:
    keys = list(entries)
    return tuple(keys[keys.index(key) + 1 :]) if key in entries else ()


def _move_to_end(entries: dict[Any, Any], keys: tuple[Any, ...]) -> None:
    from collections import deque

    there = [key for key in keys if key in entries]
    # In C throughout, so that no other thread can find a key missing in between.
    deque(map(entries.__setitem__, there, map(entries.pop, there)), maxlen=0)


class _Default:
    """The default of one parameter of a Python function.

    The tuple `__defaults__` is immutable, so writing makes a new one. When all items are again what they were
    before the first write, the original tuple is put back, whatever the order of writes.
    """

    _first: Final[WeakKeyDictionary[FunctionType, tuple[Any, ...]]] = WeakKeyDictionary()

    def __init__(self, function: FunctionType, parameter: str) -> None:
        self._function = function
        self._parameter = parameter
        self._keyword_only = parameter in (function.__kwdefaults__ or {})

    def read(self) -> Any:
        if self._keyword_only:
            return (self._function.__kwdefaults__ or {}).get(self._parameter, MISSING)
        position = _position(self._function, self._parameter)
        return MISSING if position is None else (self._function.__defaults__ or ())[position]

    def write(self, value: Any) -> None:
        if self._keyword_only:
            self._function.__kwdefaults__ = self._function.__kwdefaults__ or {}
            self._function.__kwdefaults__[self._parameter] = value
            return
        position, present = _position(self._function, self._parameter), self._function.__defaults__ or ()
        if position is None:
            raise LookupError(f"{self._function.__qualname__}() has no default for {self._parameter!r} any more")
        first = self._first.setdefault(self._function, present)
        wanted = (*present[:position], value, *present[position + 1 :])
        is_first = len(first) == len(wanted) and all(map(operator.is_, first, wanted))
        self._function.__defaults__ = self._first.pop(self._function) if is_first else wanted


def _position(function: FunctionType, parameter: str) -> int | None:
    """The index of the parameter in `__defaults__`, which covers the last positional parameters."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    with_default = positional[len(positional) - len(function.__defaults__ or ()) :]
    return with_default.index(parameter) if parameter in with_default else None


# What is there --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """The place of a target, and its current content."""

    target: Target
    owner: Any
    """The module, class or other object; for an item its container, for a default argument its function."""
    kind: Kind
    """Kind of the place; never SETTER, since getter and setter of a property are one place of kind PROPERTY."""
    read: Callable[[], Any]
    """Returns what is stored there now, or MISSING."""
    write: Callable[[Any], None]
    """Stores a value; MISSING deletes what is stored."""
    own: Any
    """Content, without binding descriptors; MISSING for an inherited or absent attribute."""
    found: Any
    """Value of the attribute, looked up in the bases too, without binding descriptors; MISSING if absent."""

    @property
    def name(self) -> str:
        """The name within the owner."""
        return self.target.name

    @property
    def key(self) -> tuple[int, str]:
        """The key of the slot. Valid while `owner` is alive, which the holder of the key must ensure."""
        return id(self.owner), self.name


def locate(target: Target) -> Any:
    """Import the target's module, and return the target's owner.

    Raises TargetError if the target does not resolve, or Python does not allow changing it.
    """
    if target.held is not MISSING:
        return _changeable(target, target.held)
    try:
        module = importlib.import_module(target.module)
    except Exception as error:  # a module may raise anything on import
        absent = isinstance(error, ModuleNotFoundError) and f"{target.module}.".startswith(f"{error.name}.")
        suggestion = _alike(target, target.module.rpartition(".")[2], _siblings(target.module)) if absent else ""
        why = f"importing {target.module!r} raised {error!r}"
        raise refuse(target, why, suggestion=suggestion, is_absent=absent) from error
    return _owner(target, module)


def owner_now(target: Target) -> Any:
    """The owner that the target leads to in the modules that are loaded, or MISSING."""
    module = sys.modules.get(target.module)
    try:
        return target.held if target.held is not MISSING else MISSING if module is None else _owner(target, module)
    except Exception:  # noqa: BLE001 - importing may raise anything; then the owner is gone
        return MISSING


def describe(target: Target, owner: Any, kind: str = "auto") -> Place:
    """Describe the place that `target` names. `kind` is "auto" or the `Kind` that the caller expects.

    Raises TargetError if the place is empty, is of another kind, or cannot be wrapped. Changes nothing.
    """
    if kind in (Kind.ADD, Kind.DELETE) and (target.parameter is not None or isinstance(owner, MutableSequence)):
        raise refuse(target, f"kind '{kind}' is for attributes and for the items of a dictionary")
    stored, found = _stored(target, owner), _find(target, owner)
    if kind == Kind.ATTRIBUTE:
        _check_attribute(target, owner, found)
    elif kind == Kind.ADD and found is not MISSING:
        raise refuse(target, f"it is there already, a {type(found).__name__}; leave out kind='add' to patch it")
    elif kind != Kind.ADD and found is MISSING:
        what = f"attribute {target.name!r}" if target.is_attribute else f"item {target.name}"
        hint = "" if isinstance(owner, MutableSequence) else ' (kind="add" is for adding one)'
        raise refuse(
            target,
            f"{_name(owner)} has no {what}{hint}",
            suggestion=_alike(target, target.path[-1], dir(owner)) if target.is_attribute else "",
            is_absent=True,
        )
    there = _kind_of(target, owner, found, kind)
    own = stored.read()
    place = Place(target=target, owner=owner, kind=there, read=stored.read, write=stored.write, own=own, found=found)
    accept(target, place, kind)
    return place


def accept(target: Target, place: Place, kind: str) -> None:
    """Raise TargetError if the place, patched already or not, cannot take a patch of this kind."""
    expected = Kind.PROPERTY if kind == Kind.SETTER else kind
    implied = place.kind not in (*STORED, Kind.ATTRIBUTE) or target.parameter is not None
    added = place.read() if place.kind == Kind.ADD and place.own is MISSING else MISSING
    if added is not MISSING and kind in ("auto", "value"):
        implied, expected = callable(added), Kind.ADD if kind == "value" else expected
    if expected != place.kind and not (expected == "auto" and implied):
        raise refuse(target, f"its kind is {place.kind.value!r}, and the patch says {kind!r}")
    if kind == Kind.DELETE and place.own is MISSING:
        raise refuse(target, f"{_name(place.owner)} inherits it; delete it where it is defined")
    if place.kind == Kind.PROPERTY and kind == Kind.SETTER and place.found.fset is None:
        raise refuse(target, "it is a property without a setter, so no write can be wrapped")
    if place.kind == Kind.PROPERTY and kind != Kind.SETTER and place.found.fget is None:
        raise refuse(target, "it is a property without a getter, so no read can be wrapped")


def rehearse(place: Place) -> None:
    """Raise TargetError if the owner's own `__setattr__`, such as that of a metaclass, rejects a change.

    Tried by setting the current value again; a plain `__setattr__` is not tried.
    """
    setter: object = type(place.owner).__setattr__
    plain = setter in (type.__setattr__, object.__setattr__, ModuleType.__setattr__)
    if plain or place.found is MISSING or not place.target.is_attribute:
        return
    try:
        place.write(place.found)
        stored = place.read()
        if place.own is MISSING and stored is not MISSING:
            place.write(MISSING)
    except Exception as error:  # a foreign `__setattr__` may raise anything
        why = f"{type(place.owner).__qualname__}.__setattr__ does not let it be set: {error!r}"
        raise refuse(place.target, why) from error
    if stored is not place.found:
        put_back(place, place.own)
        raise refuse(place.target, f"{type(place.owner).__qualname__}.__setattr__ stores it elsewhere")


def put_back(place: Place, before: Any) -> None:
    """Undo what a foreign `__setattr__`, such as that of a torch module, has stored elsewhere or otherwise."""
    if before is MISSING or place.read() is MISSING:
        with contextlib.suppress(Exception):  # nothing is there
            delattr(place.owner, place.name)
    if before is not MISSING:
        (type if isinstance(place.owner, type) else object).__setattr__(place.owner, place.name, before)


def _siblings(module: str) -> list[str]:
    """The names beside a module that cannot be found: of its package, or of the top level."""
    import pkgutil

    parent = module.rpartition(".")[0]
    if not parent:
        return [*sys.stdlib_module_names, *(found.name for found in pkgutil.iter_modules())]
    return [found.name for found in pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", ()))]


def _owner(target: Target, module: ModuleType) -> Any:
    found: Any = module
    for part in target.owner_path:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            why = f"{_name(found)} has no attribute {part!r}"
            raise refuse(target, why, suggestion=_alike(target, part, dir(found)), is_absent=True) from error
    if target.parameter is not None:
        return _function_with_default(target, found, target.parameter)
    if target.key is not MISSING and not isinstance(found, MutableMapping | MutableSequence):
        raise refuse(target, f"{_name(found)} is not a dictionary or list whose items can be set")
    return found if target.key is not MISSING else _changeable(target, found)


def _changeable(target: Target, owner: Any) -> Any:
    if isinstance(owner, type) and owner.__flags__ & _IMMUTABLE_TYPE:
        raise refuse(target, f"{_name(owner)} is an immutable type; patch what calls it instead")
    if not hasattr(owner, "__dict__"):
        what = f"{_name(owner)} is neither a module nor a class"
        raise refuse(target, f"{what}, and has no __dict__ to set an attribute in")
    return owner


def _function_with_default(target: Target, found: Any, parameter: str) -> FunctionType:
    inner = found
    while inner is not None:  # through all wrappers, including our own patches
        if type(inner) is FunctionType and _Default(inner, parameter).read() is not MISSING:
            return inner
        inner = getattr(inner, "__wrapped__", None) or getattr(inner, "__func__", None)
    raise refuse(target, f"{_name(found)} is not a Python function with a default for {parameter!r}", is_absent=True)


def _stored(target: Target, owner: Any) -> _Attribute | _Item | _Default:
    if target.parameter is not None:
        return _Default(owner, target.parameter)
    return _Attribute(owner, target.name) if target.key is MISSING else _Item(owner, target.key)


def _find(target: Target, owner: Any) -> Any:
    if target.parameter is not None:
        return _Default(owner, target.parameter).read()
    if target.key is not MISSING:
        return _Item(owner, target.key).find()
    if isinstance(owner, type):
        return next((vars(base)[target.name] for base in owner.__mro__ if target.name in vars(base)), MISSING)
    # Modules may create attributes on first access (PEP 562) and usually store them, so access before looking. A
    # method of another object is returned bound.
    return getattr(owner, target.name, MISSING)


def _check_attribute(target: Target, owner: Any, found: Any) -> None:
    if not isinstance(owner, type):
        what = "a module" if isinstance(owner, ModuleType) else "no class"
        raise refuse(target, f"kind 'attribute' is for what instances of a class store, and this is {what}")
    if owner.__dictoffset__ == 0:
        raise refuse(target, f"instances of {_name(owner)} have no __dict__ to store an attribute in")
    if hasattr(type(found), "__set__"):
        raise refuse(target, f"it is a {type(found).__name__}, which stores the value itself; patch that instead")


def _kind_of(target: Target, owner: Any, found: Any, kind: str) -> Kind:
    if target.is_attribute and not isinstance(owner, type) and kind != Kind.ADD:
        _check_object(target, owner)
    if kind in (Kind.ATTRIBUTE, Kind.VALUE, Kind.ADD, Kind.DELETE):
        return Kind(kind)
    if target.parameter is not None:
        return Kind.VALUE
    return _kind_found(target, owner, found, kind)


def _kind_found(target: Target, owner: Any, found: Any, kind: str) -> Kind:
    if kind == Kind.CLASS and not isinstance(found, type):
        raise refuse(target, f"it is an object of type {type(found).__name__!r}, and the patch says 'class'")
    if kind == Kind.CLASS:
        return Kind.CLASS
    if isinstance(found, type):
        raise refuse(target, 'it is a class; patch its methods, __init__ or __new__ instead, or say kind="class"')
    if isinstance(owner, type):
        return _kind_in_class(target, owner, found)
    if callable(found):
        return Kind.FUNCTION
    why = "which cannot be called and so cannot be wrapped"
    raise refuse(target, f'it is a {type(found).__name__}, {why}; to replace it, say kind="value"')


def _kind_in_class(target: Target, owner: type, found: Any) -> Kind:
    name = target.path[-1]
    if name in ("__new__", "__init__") and found is vars(object)[name]:
        # object's own methods refuse arguments once a class defines one of the two, or has ever had a __new__.
        raise refuse(target, f"{_name(owner)} has only the {name} of object; patch what creates its instances")
    # Subclasses of these may bind in their own way, which rebuilding would lose. `__class__`, not `type`: a wrapt
    # proxy around a classmethod, ours or somebody else's, has the `__class__` of the wrapped object.
    if found.__class__ in _DESCRIPTORS:
        return _DESCRIPTORS[found.__class__]
    if name == "__new__" and isinstance(found, BuiltinFunctionType):  # of a base that is written in C
        return Kind.STATICMETHOD
    if callable(found) and hasattr(type(found), "__get__") and not isinstance(found, tuple(_DESCRIPTORS)):
        return Kind.METHOD
    why = f'it is a {type(found).__name__}, neither a method nor a plain property; to replace it, say kind="value"'
    raise refuse(target, why)


def _check_object(target: Target, owner: Any) -> None:
    """Raise TargetError for an attribute that would not be stored in the `__dict__` of the object when set."""
    name = target.path[-1]
    on_class = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), MISSING)
    if hasattr(type(on_class), "__set__"):
        raise refuse(target, f"it is a {type(on_class).__name__} of {_name(type(owner))}; patch it there")
    if on_class is MISSING and name not in vars(owner) and not isinstance(owner, ModuleType):
        raise refuse(target, f"it is neither in the __dict__ of {_name(owner)} nor on its class", is_absent=True)


_DESCRIPTORS: Final = {
    classmethod: Kind.CLASSMETHOD,
    ClassMethodDescriptorType: Kind.CLASSMETHOD,  # of types written in C, such as `object.__init_subclass__`
    staticmethod: Kind.STATICMETHOD,
    property: Kind.PROPERTY,
}


def _name(value: object) -> str:
    if isinstance(value, ModuleType):
        return f"module {value.__name__!r}"
    if isinstance(value, type):
        return f"class {value.__qualname__!r}"
    return f"an object of type {type(value).__name__!r}"
