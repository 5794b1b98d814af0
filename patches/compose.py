"""Composition: the single object installed at a place for a chain of links, the last link outermost.

Four forms: wrapt's `FunctionWrapper` for calls; plain functions for code that Dynamo traces, since it silently
bypasses wrapt's objects; a `property` for reads, since wrapt's wrapper has no effect on a property; for a value,
the wrappers' result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, TypeAlias, cast

import wrapt

from .link import Link
from .patch import Patch
from .stored import StoredAttribute
from .target import MISSING, Kind, Place

__all__ = ["compose", "is_traced"]

Getter: TypeAlias = Callable[[Any], Any]
Setter: TypeAlias = Callable[[Any, Any], None]


def compose(place: Place, links: Sequence[Link]) -> object:
    """Compose the object to install at `place`: every link's wrapper around the object that is there now."""
    assert links, "a slot without links holds its original"
    if place.kind == Kind.ATTRIBUTE:
        return _stored_property(place, links)
    if place.kind == Kind.PROPERTY:
        return _property(place, links)
    if place.kind in (Kind.VALUE, Kind.CLASS):
        return _value(place, links)
    if is_traced(place, [link.patch for link in links]):
        return _closures(place, links)
    return functools.reduce(_wrap, links, _innermost(place))


def is_traced(place: Place, patches: Iterable[Patch]) -> bool:
    """Whether torch.compile sees the object composed for these patches; it looks through wrapt's objects."""
    called = place.kind in (Kind.FUNCTION, Kind.METHOD, Kind.CLASSMETHOD, Kind.STATICMETHOD)
    return not called or any(patch.traced for patch in patches)


def _wrap(inner: Any, link: Link) -> Any:
    return wrapt.FunctionWrapper(inner, _selective(link))


def _selective(link: Link) -> Callable[..., Any]:
    wrapper, subject_of = link.patch.wrapper, link.patch.subject
    if link.counter is not None:
        wrapper = link.counter.around(wrapper, traced=link.patch.traced)

    def call(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if link.everyone or link.covers(instance):
            return wrapper(wrapped, instance, args, kwargs)
        return wrapped(*args, **kwargs)

    def call_by_subject(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if link.everyone or link.covers(subject_of(instance, args, kwargs)):  # type: ignore[misc]  # not None here
            return wrapper(wrapped, instance, args, kwargs)
        return wrapped(*args, **kwargs)

    return call if subject_of is None else call_by_subject


def _closures(place: Place, links: Sequence[Link]) -> object:
    inner = _innermost(place)
    if place.kind == Kind.STATICMETHOD:
        return staticmethod(functools.reduce(_around_function, links, _unbound(inner)))
    if place.kind == Kind.CLASSMETHOD:
        return classmethod(functools.reduce(_around_method, links, _unbound(inner)))
    return functools.reduce(_around_method if place.kind == Kind.METHOD else _around_function, links, inner)


def _unbound(descriptor: Any) -> Any:
    """The function inside a classmethod or staticmethod."""
    if type(descriptor) in (classmethod, staticmethod):
        return descriptor.__func__

    # Somebody else's proxy around a classmethod or staticmethod: its `__func__` would drop their wrapper.
    @functools.wraps(descriptor.__func__)
    def bind_and_call(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
        return descriptor.__get__(None, cls)(*args, **kwargs)

    @functools.wraps(descriptor.__func__)
    def call(*args: Any, **kwargs: Any) -> Any:
        return descriptor.__get__(None, object)(*args, **kwargs)

    return bind_and_call if descriptor.__class__ is classmethod else call


def _around_function(inner: Any, link: Link) -> Any:
    call = _selective(link)

    @functools.wraps(inner)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return call(inner, None, args, kwargs)

    return patched


def _around_method(inner: Any, link: Link) -> Any:
    call = _selective(link)

    @functools.wraps(inner)
    def patched(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return call(inner.__get__(self), self, args, kwargs)

    return patched


def _property(place: Place, links: Sequence[Link]) -> property:
    own: property = _innermost(place)
    readers = [link for link in links if link.patch.kind != Kind.SETTER]
    writers = [link for link in links if link.patch.kind == Kind.SETTER]
    if readers:
        own = own.getter(functools.reduce(_around_getter, readers, cast("Getter", own.fget)))
    if writers:
        own = own.setter(functools.reduce(_around_setter, writers, cast("Setter", own.fset)))
    return own


def _stored_property(place: Place, links: Sequence[Link]) -> property:
    assert isinstance(place.owner, type)
    stored = StoredAttribute(place.owner, place.name, place.own)
    getter = functools.reduce(_around_getter, links, cast("Getter", stored.read))
    return property(stored.guard(getter, place.target), stored.write, stored.delete)


def _around_getter(inner: Getter, link: Link) -> Getter:
    call = _selective(link)

    def patched(instance: Any) -> Any:
        return call(functools.partial(inner, instance), instance, (), {})

    return patched


def _around_setter(inner: Setter, link: Link) -> Setter:
    call = _selective(link)

    def patched(instance: Any, value: Any) -> None:
        call(functools.partial(inner, instance), instance, (value,), {})

    return patched


def _value(place: Place, links: Sequence[Link]) -> object:
    value = _innermost(place)
    for link in links:
        if link.everyone:
            value = link.value_over(value)
        if place.kind == Kind.CLASS and not isinstance(value, type):
            raise TypeError(f"the wrapper of {link.patch.id!r} must return a class, and returned {value!r}")
    return value


def _innermost(place: Place) -> Any:
    """The innermost callable of the chain: the original, or if inherited, the bases' attribute at call time."""
    if place.own is not MISSING:
        return place.own
    if place.kind in (Kind.VALUE, Kind.CLASS) or isinstance(place.owner, ModuleType):
        return place.found
    if not isinstance(place.owner, type):
        return _method_of_object(place.owner, place.name, place.found)
    return _INHERITED[place.kind](place.owner, place.name, place.found)


# An inherited attribute is looked up on each call, as Python does: the base may be patched later.


def _inherited_method(owner: type, name: str, found: Any) -> Any:
    @functools.wraps(found)
    def inherited(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, self), name)(*args, **kwargs)

    return inherited


def _inherited_classmethod(owner: type, name: str, found: Any) -> Any:
    return classmethod(_inherited_method(owner, name, found.__func__))


def _inherited_staticmethod(owner: type, name: str, found: Any) -> Any:
    @functools.wraps(found.__func__)
    def inherited(*args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, owner), name)(*args, **kwargs)

    return staticmethod(inherited)


def _inherited_property(owner: type, name: str, found: property) -> property:
    def inherited(self: Any) -> Any:
        return getattr(super(owner, self), name)

    def inherited_setter(self: Any, value: Any) -> None:
        getattr(super(owner, type(self)), name).fset(self, value)

    own = found if found.fget is None else found.getter(inherited)
    return own if found.fset is None else own.setter(inherited_setter)


def _method_of_object(owner: Any, name: str, found: Any) -> Any:
    @functools.wraps(found)
    def inherited(*args: Any, **kwargs: Any) -> Any:
        method = next(vars(base)[name] for base in type(owner).__mro__ if name in vars(base))
        return method.__get__(owner, type(owner))(*args, **kwargs)

    return inherited


_INHERITED = {
    Kind.METHOD: _inherited_method,
    Kind.CLASSMETHOD: _inherited_classmethod,
    Kind.STATICMETHOD: _inherited_staticmethod,
    Kind.PROPERTY: _inherited_property,
}
