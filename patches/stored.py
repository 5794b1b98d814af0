"""Stored attributes, read, written and deleted as if the class had no descriptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import WrapperError
from .target import MISSING

__all__ = ["StoredAttribute"]


class StoredAttribute:
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
