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
from typing import Any, Final, TypeAlias, cast

from .errors import WrapperError
from .ledger import Calls, Receipt
from .patch import Patch, Wrapper
from .target import MISSING, STORED, Kind, Place

__all__ = ["Form", "Link", "core", "is_plain", "is_traced", "passed", "prepare"]

_CALLED: Final = (Kind.FUNCTION, Kind.METHOD, Kind.CLASSMETHOD, Kind.STATICMETHOD)
_CHANGED_BY_CLOSURES: Final = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
)
_counting: Final[dict[str, Calls]] = {}


def passed(patch_id: str) -> None:
    """Mark the call in progress as passed through: called by a wrapper that had nothing to do. See `Receipt.passed`.

    Does nothing unless calls of the patch are counted.
    """
    calls = _counting.get(patch_id)
    if calls is not None:
        calls.passed += 1


class Link:
    """One patch in the chain of a slot, active while at least one receipt holds it.

    However many receipts there are, the wrapper runs once per call, and only if one of them covers the subject;
    a receipt without a scope covers everything. Composed objects consult the link on each call.
    """

    __slots__ = ("_covered", "_made", "_predicates", "_receipts", "_wrapper", "calls", "direct", "everyone", "patch")

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.calls: Calls | None = None
        """The counts of calls, if a receipt has asked for them."""
        self.everyone = False
        """Whether some receipt covers every subject."""
        self.direct: Any = None
        """A function to call instead of the wrapper, with the arguments of the call, or None."""
        self._receipts: tuple[Receipt, ...] = ()
        self._covered: dict[int, int] = {}  # `id` of a covered object -> number of scopes that cover it
        self._predicates: tuple[Callable[[Any], bool], ...] = ()
        self._made: tuple[object, object] | None = None
        self._wrapper: Wrapper | None = None

    def __bool__(self) -> bool:
        return bool(self._receipts)

    def wrapper(self, kind: Kind) -> Wrapper:
        """The patch in the form of a wrapper; its factory has run once."""
        if self._wrapper is None:
            self._wrapper, self.direct = self.patch.wrapper_for(kind)
        wrapper, calls = self._wrapper, self.calls
        if calls is None:
            return wrapper
        self.direct = None  # which would not be counted

        # Without a lock, which torch.compile cannot trace; no other thread of CPython runs between the two bytecodes.
        def counted(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.made += 1
            return wrapper(wrapped, instance, args, kwargs)

        return counted

    def value_over(self, inner: object, kind: Kind) -> object:
        """The wrapper's result for a value, computed once, so that a class it makes stays the same class."""
        if self._made is None or self._made[0] is not inner:
            self._made = inner, self.wrapper(kind)(lambda: inner, None, (), {})
        return self._made[1]

    def covers(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call goes through the wrapper; to be asked if `everyone` is False."""
        if not self._receipts:
            return False
        subject_of = self.patch.subject
        subject = instance if subject_of is None else subject_of(instance, args, kwargs)
        if id(subject) in self._covered:
            return True
        for chooses in self._predicates:  # noqa: SIM110 - `any` with a generator takes four times as long, on every call
            if chooses(subject):
                return True
        return False

    def _covers_as_traced(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        subject_of = self.patch.subject
        subject = instance if subject_of is None else subject_of(instance, args, kwargs)
        return _is_covered(self, subject) or any(chooses(subject) for chooses in self._predicates)

    #: Dynamo traces this function instead of one that has it.
    covers._torchdynamo_inline = _covers_as_traced  # type: ignore[attr-defined]

    def hold(self, receipt: Receipt) -> None:
        """Add a receipt that keeps the link active."""
        if receipt.count_calls:
            self.calls = self.calls or Calls()
            _counting[self.patch.id] = self.calls
            receipt.count(self.calls)
        self._set((*self._receipts, receipt))

    def drop(self, receipt: Receipt) -> bool:
        """Remove a receipt; returns False if it does not hold the link."""
        held = receipt in self._receipts
        if receipt.scope is not None:
            receipt.scope.cover(None)
        self._set(tuple(other for other in self._receipts if other is not receipt))
        if not self._receipts and _counting.get(self.patch.id) is self.calls:
            _counting.pop(self.patch.id, None)
        return held

    def refresh(self) -> None:
        """Update the scopes after receipts were disabled or enabled."""
        self._set(self._receipts)

    def _set(self, receipts: tuple[Receipt, ...]) -> None:
        # The receipts are set last, so that dropping a receipt again completes a drop that was interrupted.
        predicates = []
        for receipt in receipts:
            if receipt.scope is not None:
                receipt.scope.cover(None if receipt.disabled else self._covered)
            if receipt.scope is not None and receipt.scope.predicate is not None and not receipt.disabled:
                predicates.append(receipt.scope.predicate)
        self._predicates = tuple(predicates)
        self.everyone = any(receipt.scope is None and not receipt.disabled for receipt in receipts)
        self._receipts = receipts


def _is_covered(link: Any, subject: object) -> bool:
    """Whether a scope names the object, where torch.compile traces.

    Dynamo guards the identity of an object whose `id` is taken, and would compile each of many equal blocks by itself.
    What `comptime` leads to adds a guard of whether it is covered; what that does not know has its identity guarded.
    """
    from torch._dynamo.comptime import comptime

    found: bool | None = None
    comptime(_find)
    return id(subject) in link._covered if found is None else found


def _find(context: Any) -> None:
    from torch._dynamo.guards import install_guard
    from torch._dynamo.variables import ConstantVariable, UserDefinedObjectVariable

    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    link, subject = (frame.symbolic_locals[name].realize() for name in ("link", "subject"))
    if isinstance(subject, UserDefinedObjectVariable) and subject.source is not None:
        found = id(subject.value) in link.value._covered
        install_guard(subject.source.make_guard(functools.partial(_guard, link.value, found)))
        frame.symbolic_locals["found"] = ConstantVariable.create(found)


def _guard(link: Link, found: bool, builder: Any, guard: Any) -> None:  # noqa: FBT001 - torch calls it
    manager, text = builder.get_guard_manager(guard), [f"whether {link.patch.id} covers {guard.name}: {found}"]
    if not any(leaf.verbose_code_parts() == text for leaf in manager.get_leaf_guards()):
        manager.add_lambda_guard(lambda subject: (id(subject) in link._covered) is found, text, guard.user_stack)


class _Nobody:
    """The link of an empty chain."""

    everyone, direct = False, None

    @staticmethod
    def covers(_instance: Any, _args: Any, _kwargs: Any) -> bool:
        return False


_Top: TypeAlias = tuple[Any, Any, Any]
"""Outermost link, its wrapper, and the callable inside it: one tuple, so that other threads see all or nothing."""
_Put: TypeAlias = Callable[[_Top], None]


class Form:
    """The object at one place, and what it is composed of."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._made: tuple[object, Any, _Put] | None = None

    def over(self, links: Sequence[Link]) -> object:
        """The object to install for these links, around the one that was there before any patch."""
        assert links, "a slot without links holds its original"
        kind = self._place.kind
        if kind in STORED:
            return self._value(links)
        if kind in (Kind.PROPERTY, Kind.ATTRIBUTE):
            return _property(self._place, links)
        if self._made is None:
            self._made = self._make()
        installed, _, put = self._made
        inner = self._inner
        for link in links[:-1]:
            outer, put_outer = _closure(self._shape, takes_self=self._takes_self)
            put_outer((link, link.wrapper(kind), inner))
            inner = outer
        put((links[-1], links[-1].wrapper(kind), inner))
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
        installed: Any = closure if is_plain(place) else _disguise()(self._shape, closure, place)
        if bound is not None:
            return MethodType(closure, bound.__self__), closure, put
        if place.kind == Kind.STATICMETHOD:
            return staticmethod(installed), closure, put
        return classmethod(installed) if place.kind == Kind.CLASSMETHOD else installed, closure, put

    def _value(self, links: Sequence[Link]) -> object:
        place = self._place
        value = place.found if place.own is MISSING else place.own
        for link in links:
            if link.everyone and link.patch.kind == "auto" and place.kind == Kind.ADD:
                value = self._over_added(value, link)
            elif link.everyone:
                value = link.value_over(value, place.kind)
            if place.kind == Kind.CLASS and not isinstance(value, type):
                raise TypeError(f"the wrapper of {link.patch.id!r} must return a class, and returned {value!r}")
        return value if place.kind != Kind.DELETE or not any(link.everyone for link in links) else MISSING

    def _over_added(self, added: Any, link: Link) -> object:
        """A form of its own around a function that another patch has added."""
        kind = Kind.METHOD if isinstance(self._place.owner, type) and hasattr(type(added), "__get__") else Kind.FUNCTION
        return Form(replace(self._place, kind=kind, own=added, found=added)).over([link])


# Functions ------------------------------------------------------------------------------------------------------------


def is_traced(place: Place) -> bool:
    """Whether torch.compile sees what is installed at a place; it looks through a disguise."""
    return place.kind not in _CALLED or is_plain(place)


def is_plain(place: Place) -> bool:
    """Whether a closure can take the place of what is called there, and be the same sort of thing."""
    function = _unbound(place.found)
    if isinstance(function, MethodType):  # bound already, such as a method of an object in hand
        function = function.__func__
    return type(function) is FunctionType and not function.__code__.co_flags & _CHANGED_BY_CLOSURES


def _closure(shape: Any, *, takes_self: bool) -> tuple[Any, _Put]:
    """A function that calls the link that is put into it, with the name and signature of `shape`."""
    patched, put = _around_method() if takes_self else _around_function()
    return functools.wraps(shape)(patched), put


def _around_function() -> tuple[Any, _Put]:
    top: _Top = (_Nobody, None, None)

    def patched(*args: Any, **kwargs: Any) -> Any:
        link, wrapper, inner = top
        if not link.everyone and not link.covers(None, args, kwargs):
            return inner(*args, **kwargs)
        if link.direct is not None:
            return link.direct(*args, **kwargs)
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
        link, wrapper, inner = top
        if not link.everyone and not link.covers(self, args, kwargs):
            return inner(self, *args, **kwargs)
        if link.direct is not None:
            return link.direct(self, *args, **kwargs)
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
        _disguise()


@functools.cache
def _disguise() -> Any:
    """A closure that looks like the object it was made around, in every respect but that it is called.

    Binds as a function does; copies are the object itself, as those of functions are; a pickle is of the name of the
    target, and so leads to whatever is there where it is loaded.
    """
    import wrapt

    class Disguise(wrapt.FunctionWrapper[Any, Any]):
        def __init__(self, shape: Any, closure: Callable[..., Any], place: Place) -> None:
            super().__init__(shape, lambda _wrapped, _instance, args, kwargs: closure(*args, **kwargs))
            self._self_target = place.target
            self._self_binds = place.kind in (Kind.METHOD, Kind.CLASSMETHOD) or hasattr(type(shape), "__get__")

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            return self if instance is None or not self._self_binds else MethodType(self, instance)

        def __deepcopy__(self, memo: object = None) -> Any:
            return self

        __copy__ = __deepcopy__

        def __reduce_ex__(self, protocol: Any) -> Any:
            target = self._self_target
            held, name = target.held, target.name
            return (getattr, (held, name)) if held is not MISSING else (resolve_name, (str(target),))

    return Disguise


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

    # An inherited attribute is looked up on each call, as Python does: the base may be patched later.
    def inherited(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, self), name)(*args, **kwargs)

    def inherited_static(*args: Any, **kwargs: Any) -> Any:
        return inherited(owner, *args, **kwargs)

    return inherited_static if place.kind == Kind.STATICMETHOD else inherited


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


def _property(place: Place, links: Sequence[Link]) -> property:
    owner, name = place.owner, place.name
    if place.kind == Kind.ATTRIBUTE:
        stored: Any = _StoredAttribute(owner, name, place.own)
        getter = functools.reduce(_around, links, stored.read)
        return property(stored.guard(getter, str(place.target)), stored.write, stored.delete)
    own: Any = place.found if place.own is MISSING else place.own
    read, write = own.fget, own.fset
    if place.own is MISSING:  # inherited, and so looked up on each access
        read = read and (lambda self: getattr(super(owner, self), name))
        write = write and (lambda self, value: getattr(super(owner, type(self)), name).fset(self, value))
    readers = [link for link in links if link.patch.kind != "setter"]
    writers = [link for link in links if link.patch.kind == "setter"]
    getter, setter = functools.reduce(_around, readers, read), functools.reduce(_around, writers, write)
    # With the name, the doc, and whether it is abstract.
    if getter is not own.fget:
        own = own.getter(functools.update_wrapper(getter, own.fget))
    if setter is not own.fset:
        own = own.setter(functools.update_wrapper(setter, own.fset))
    return cast("property", own)


def _around(inner: Callable[..., Any], link: Link) -> Callable[..., Any]:
    wrapper = link.wrapper(Kind.PROPERTY)

    def patched(instance: Any, *value: Any) -> Any:  # a value if it is a setter
        if link.everyone or link.covers(instance, value, {}):
            return wrapper(functools.partial(inner, instance), instance, value, {})
        return inner(instance, *value)

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
        # As it would be without the property: the stored value, or AttributeError.
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
        instance.__dict__[self._name] = value

    def delete(self, instance: Any) -> None:
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
