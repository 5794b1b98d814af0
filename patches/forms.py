"""Forms: the single object installed at a place for a chain of links, the last link outermost.

A plain Python function gets a closure, which torch.compile traces, and which pickles and copies as functions do.
Wherever a closure would change what a thing is (functions written in C, `lru_cache`, partials, callable objects,
generators, coroutines) wrapt's `FunctionWrapper` disguises the closure. Either is made once for a slot, and only the
chain in it changes: a caller that has kept it follows the slot, and passes straight through once the slot is empty.
Properties are composed anew, since wrapt's wrapper has no effect on one; so are values.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final, Protocol, TypeAlias, cast

from .errors import WrapperError
from .patch import Patch, Wrapper
from .target import MISSING, STORED, Kind, Place

__all__ = ["Form", "Layer", "core", "is_plain", "is_traced", "prepare"]

_CALLED: Final = (Kind.FUNCTION, Kind.METHOD, Kind.CLASSMETHOD, Kind.STATICMETHOD)
_CHANGED_BY_CLOSURES: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_ITERABLE_COROUTINE: Final = inspect.CO_ITERABLE_COROUTINE


class Layer(Protocol):
    """One patch in a chain, consulted on every call."""

    patch: Patch
    everyone: bool
    """Whether it covers every subject."""

    def covers(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call goes through the wrapper."""

    direct: Any
    """A function to call instead of the wrapper, with the arguments of the call, or None."""

    def wrapper(self, kind: Kind) -> Wrapper:
        """The patch in the form of a wrapper, counted if somebody asks for it."""

    def value_over(self, inner: object, kind: Kind) -> object:
        """The value that the patch makes of an inner one; always the same for the same."""


class _Nobody:
    """The layer of an empty chain."""

    everyone, direct = False, None

    @staticmethod
    def covers(_instance: Any, _args: Any, _kwargs: Any) -> bool:
        return False


_Top: TypeAlias = tuple[Any, Any, Any]
"""Outermost layer, its wrapper, and the callable inside it: one tuple, so that other threads see all or nothing."""
_Put: TypeAlias = Callable[[_Top], None]
_Getter: TypeAlias = Callable[[Any], Any]


class Form:
    """The object at one place, and what it is composed of."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._made: tuple[object, Any, _Put] | None = None

    def over(self, layers: Sequence[Layer]) -> object:
        """The object to install for these layers, around the one that was there before any patch."""
        assert layers, "a slot without layers holds its original"
        kind = self._place.kind
        if kind in STORED:
            return self._value(layers)
        if kind in (Kind.PROPERTY, Kind.ATTRIBUTE):
            return _property(self._place, layers)
        if self._made is None:
            self._made = self._make()
        installed, _, put = self._made
        inner = self._inner
        for layer in layers[:-1]:
            outer, put_outer = _closure(self._shape, takes_self=self._takes_self)
            put_outer((layer, layer.wrapper(kind), inner))
            inner = outer
        put((layers[-1], layers[-1].wrapper(kind), inner))
        return installed

    def empty(self) -> None:
        """Let calls that still reach the installed object through, and let it be pickled by the name of its target."""
        if self._made is None:
            return
        _, closure, put = self._made
        put((_Nobody, None, self._inner))
        for name, value in vars(closure).items():
            if self._attributes.get(name, MISSING) is not value:  # set on what was taken for the function itself
                setattr(self._shape, name, value)
        if self._place.target.held is MISSING:
            _retire(closure, str(self._place.target))

    def _make(self) -> tuple[object, Any, _Put]:
        place = self._place
        bound = place.found if isinstance(place.found, MethodType) and is_plain(place) else None
        self._inner: Any = _innermost(place)
        self._shape: Any = bound.__func__ if bound is not None else _unbound(place.found)
        self._takes_self = bound is not None or place.kind in (Kind.METHOD, Kind.CLASSMETHOD)
        closure, put = _closure(self._shape, takes_self=self._takes_self)
        if bound is None and not isinstance(place.owner, type):
            _name(closure, place)
        self._attributes = dict(vars(closure))
        installed: Any = closure if is_plain(place) else _disguised(self._shape, closure, place)
        if bound is not None:
            return MethodType(closure, bound.__self__), closure, put
        if place.kind == Kind.STATICMETHOD:
            return staticmethod(installed), closure, put
        return classmethod(installed) if place.kind == Kind.CLASSMETHOD else installed, closure, put

    def _value(self, layers: Sequence[Layer]) -> object:
        place = self._place
        value = place.found if place.own is MISSING else place.own
        for layer in layers:
            if layer.everyone and layer.patch.kind == "auto" and place.kind == Kind.ADD:
                value = self._over_added(value, layer)
            elif layer.everyone:
                value = layer.value_over(value, place.kind)
            if place.kind == Kind.CLASS and not isinstance(value, type):
                raise TypeError(f"the wrapper of {layer.patch.id!r} must return a class, and returned {value!r}")
        return value if place.kind != Kind.DELETE or not any(layer.everyone for layer in layers) else MISSING

    def _over_added(self, added: Any, layer: Layer) -> object:
        """A form of its own around a function that another patch has added."""
        kind = Kind.METHOD if isinstance(self._place.owner, type) and hasattr(type(added), "__get__") else Kind.FUNCTION
        return Form(replace(self._place, kind=kind, own=added, found=added)).over([layer])


# Functions ------------------------------------------------------------------------------------------------------------


def is_traced(place: Place) -> bool:
    """Whether torch.compile sees what is installed at a place; it looks through a disguise."""
    return place.kind not in _CALLED or is_plain(place)


def is_plain(place: Place) -> bool:
    """Whether a closure can take the place of what is called there, and be the same sort of thing."""
    function = _unbound(place.found)
    if isinstance(function, MethodType):  # bound already, such as a method of an object in hand
        function = function.__func__
    if type(function) is not FunctionType:
        return False
    return not function.__code__.co_flags & (_CHANGED_BY_CLOSURES | _ITERABLE_COROUTINE)


def _closure(shape: Any, *, takes_self: bool) -> tuple[Any, _Put]:
    """A function that calls the layer that is put into it, with the name and signature of `shape`."""
    patched, put = _around_method() if takes_self else _around_function()
    return functools.wraps(shape)(patched), put


def _around_function() -> tuple[Any, _Put]:
    top: _Top = (_Nobody, None, None)

    def patched(*args: Any, **kwargs: Any) -> Any:
        layer, wrapper, inner = top
        if not layer.everyone and not layer.covers(None, args, kwargs):
            return inner(*args, **kwargs)
        if layer.direct is not None:
            return layer.direct(*args, **kwargs)
        return wrapper(inner, None, args, kwargs)

    def put(new: _Top) -> None:
        nonlocal top
        top = new

    return patched, put


def _around_method() -> tuple[Any, _Put]:
    top: _Top = (_Nobody, None, None)
    # Dynamo rebuilds a bound method, after a break of the graph, by the name of its function: that would be this one.
    torch: Any = sys.modules.get("torch")
    is_compiling = bool if torch is None else torch.compiler.is_dynamo_compiling

    def patched(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        layer, wrapper, inner = top
        if not layer.everyone and not layer.covers(self, args, kwargs):
            return inner(self, *args, **kwargs)
        if layer.direct is not None:
            return layer.direct(self, *args, **kwargs)
        return wrapper(functools.partial(inner, self) if is_compiling() else inner.__get__(self), self, args, kwargs)

    def put(new: _Top) -> None:
        nonlocal top
        top = new

    return patched, put


def prepare(place: Place) -> None:
    """Import what a form at this place takes. wrapt takes as long as all of this package, and few patches need it; and
    an import may wait for a thread that waits for the lock of the slots, so it is to be done before.
    """
    if place.kind in _CALLED and not is_plain(place):
        from . import disguise  # noqa: F401 - to have it imported


def _disguised(shape: Any, closure: Callable[..., Any], place: Place) -> Any:
    from .disguise import Disguise

    binds = place.kind in (Kind.METHOD, Kind.CLASSMETHOD) or hasattr(type(shape), "__get__")
    return Disguise(shape, closure, target=place.target, binds=binds)


def core(value: Any) -> Any:
    """The installed object, if `value` is a bound form of it."""
    return value.__func__ if type(value) in (MethodType, staticmethod, classmethod) else value


def _unbound(found: Any) -> Any:
    """The function inside a classmethod or staticmethod."""
    if type(found) in (classmethod, staticmethod):
        return found.__func__
    if found.__class__ not in (classmethod, staticmethod):
        return found

    # Somebody else's proxy around a classmethod or staticmethod: its `__func__` would drop their wrapper.
    @functools.wraps(found.__func__)
    def bind_and_call(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
        return found.__get__(None, cls)(*args, **kwargs)

    @functools.wraps(found.__func__)
    def call(*args: Any, **kwargs: Any) -> Any:
        return found.__get__(None, object)(*args, **kwargs)

    return bind_and_call if found.__class__ is classmethod else call


def _innermost(place: Place) -> Any:
    """The innermost callable of the chain: the original, or if inherited, the bases' attribute at call time."""
    owner, name, found = place.owner, place.name, place.found
    if place.own is not MISSING:
        return found.__func__ if isinstance(found, MethodType) and is_plain(place) else _unbound(place.own)
    if isinstance(owner, ModuleType) or not place.target.is_attribute:
        return found
    if not isinstance(owner, type):
        return _method_of_object(owner, name, bound=isinstance(found, MethodType) and is_plain(place))
    if place.kind == Kind.STATICMETHOD:

        def inherited_static(*args: Any, **kwargs: Any) -> Any:
            return getattr(super(owner, owner), name)(*args, **kwargs)

        return inherited_static

    # An inherited attribute is looked up on each call, as Python does: the base may be patched later.
    def inherited(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, self), name)(*args, **kwargs)

    return inherited


def _method_of_object(owner: Any, name: str, *, bound: bool) -> Callable[..., Any]:
    def inherited(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        cls = self if isinstance(self, type) else type(self)  # a classmethod is bound to the class
        method = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        return method.__get__(None if cls is self else self, cls)(*args, **kwargs)

    return inherited if bound else functools.partial(inherited, owner)


# Pickles --------------------------------------------------------------------------------------------------------------

# pickle writes a function as its module and its name, and refuses one that is not found there. A closure that somebody
# has kept is not, once its slot is empty; so it gets a name in this module, under which it is found here, and the
# target elsewhere.
_retired: Final[dict[str, weakref.ref[Any]]] = {}


def _name(closure: Any, place: Place) -> None:
    """Name a closure so that pickle finds it, where its own name leads to another place that has the stock function."""
    target, module, name = place.target, getattr(closure, "__module__", None), closure.__qualname__
    if "<locals>" in name or (place.owner is sys.modules.get(str(module)) and place.name == name):
        return
    if isinstance(place.owner, ModuleType) and target.is_attribute:
        closure.__module__, closure.__qualname__ = place.owner.__name__, place.name
    else:
        _retire(closure, f"{module}:{name}")


def _retire(closure: Any, target: str) -> None:
    if getattr(closure, "__module__", None) == __name__:
        return
    for stale in [name for name, kept in _retired.items() if kept() is None]:
        _retired.pop(stale, None)
    name = f"{target.replace('.', '/')}#{id(closure)}"
    _retired[name] = weakref.ref(closure)
    closure.__module__, closure.__qualname__ = __name__, name


def __getattr__(name: str) -> Any:
    target, mark, _ = name.partition("#")
    if not mark:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kept = _retired[name]() if name in _retired else None
    return resolve_name(target.replace("/", ".")) if kept is None else kept


# Properties and stored attributes -------------------------------------------------------------------------------------


def _property(place: Place, layers: Sequence[Layer]) -> property:
    owner, name = place.owner, place.name
    if place.kind == Kind.ATTRIBUTE:
        stored = _StoredAttribute(owner, name, place.own)
        stored_getter: _Getter = stored.read
        getter = functools.reduce(_around_getter, layers, stored_getter)
        return property(stored.guard(getter, str(place.target)), stored.write, stored.delete)
    own: Any = place.found if place.own is MISSING else place.own
    read, write = own.fget, own.fset
    if place.own is MISSING:  # inherited, and so looked up on each access
        read = read and (lambda self: getattr(super(owner, self), name))
        write = write and (lambda self, value: getattr(super(owner, type(self)), name).fset(self, value))
    readers = [layer for layer in layers if layer.patch.kind != "setter"]
    writers = [layer for layer in layers if layer.patch.kind == "setter"]
    getter, setter = functools.reduce(_around_getter, readers, read), functools.reduce(_around_setter, writers, write)
    # With the name, the doc, and whether it is abstract.
    if getter is not own.fget:
        own = own.getter(functools.update_wrapper(getter, own.fget))
    if setter is not own.fset:
        own = own.setter(functools.update_wrapper(setter, own.fset))
    return cast("property", own)


def _around_getter(inner: _Getter, layer: Layer) -> _Getter:
    wrapper = layer.wrapper(Kind.PROPERTY)

    def patched(instance: Any) -> Any:
        if layer.everyone or layer.covers(instance, (), {}):
            return wrapper(functools.partial(inner, instance), instance, (), {})
        return inner(instance)

    return patched


def _around_setter(inner: Any, layer: Layer) -> Callable[[Any, Any], None]:
    wrapper = layer.wrapper(Kind.SETTER)

    def patched(instance: Any, value: Any) -> None:
        if layer.everyone or layer.covers(instance, (value,), {}):
            wrapper(functools.partial(inner, instance), instance, (value,), {})
        else:
            inner(instance, value)

    return patched


class _StoredAttribute:
    """The attribute `name` of instances of `owner`, while `owner` itself has a property of that name installed.

    `own` is the previous entry of `owner.__dict__`, or MISSING. Instances store the value in the usual place: in
    their `__dict__`, or wherever the `__getattr__` of their class finds it (`torch.nn.Module` has a dictionary
    for parameters).
    """

    def __init__(self, owner: type, name: str, own: Any) -> None:
        self._owner = owner
        self._name = name
        self._own = own

    def read(self, instance: Any) -> Any:
        """Read `instance.name` as it would be without the property: the stored value, or AttributeError."""
        name = self._name
        stored = instance.__dict__
        if name in stored:
            return stored[name]
        default = self._class_default(type(instance))
        if default is not MISSING:
            bind = getattr(type(default), "__get__", None)
            return default if bind is None else bind(default, instance, type(instance))
        fallback = getattr(type(instance), "__getattr__", None)
        if fallback is not None:
            return fallback(instance, name)
        raise self._absent(instance)

    def write(self, instance: Any, value: Any) -> None:
        """Store the value in the instance's `__dict__`."""
        instance.__dict__[self._name] = value

    def delete(self, instance: Any) -> None:
        """Delete the value from the instance's `__dict__`. Raises AttributeError if it is not there."""
        if self._name not in instance.__dict__:
            raise self._absent(instance)
        del instance.__dict__[self._name]

    def guard(self, getter: Callable[[Any], Any], target: str) -> Callable[[Any], Any]:
        """Wrap `getter` so that AttributeError means only that the attribute is absent; see WrapperError."""

        def read(instance: Any) -> Any:
            try:
                return getter(instance)
            except AttributeError as error:
                if self._is_absent(instance):
                    raise
                raise WrapperError(
                    f"the wrapper of {target!r} raised AttributeError ({error}) on reading an attribute that "
                    "is there; let it raise another error, or return the value",
                    target=target,
                ) from error

        return read

    def _class_default(self, cls: type) -> Any:
        # No class before the owner in the MRO has the attribute, since it would have hidden the property.
        if self._own is not MISSING:
            return self._own
        after = cls.__mro__[cls.__mro__.index(self._owner) + 1 :]
        return next((vars(base)[self._name] for base in after if self._name in vars(base)), MISSING)

    def _is_absent(self, instance: Any) -> bool:
        try:
            self.read(instance)
        except AttributeError:
            return True
        return False

    def _absent(self, instance: Any) -> AttributeError:
        message = f"{type(instance).__name__!r} object has no attribute {self._name!r}"
        return AttributeError(message, name=self._name, obj=instance)
