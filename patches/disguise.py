"""The form of what is called and is no plain Python function, by wrapt."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from types import MethodType
from typing import Any

import wrapt

from .target import MISSING, Target

__all__ = ["Disguise"]


class Disguise(wrapt.FunctionWrapper[Any, Any]):
    """A closure that looks like the object it was made around, in every respect but that it is called.

    Binds as a function does; copies are the object itself, as those of functions are; a pickle is of the name of the
    target, and so leads to whatever is there where it is loaded.
    """

    def __init__(self, shape: Any, closure: Callable[..., Any], *, target: Target, binds: bool) -> None:
        super().__init__(shape, lambda _wrapped, _instance, args, kwargs: closure(*args, **kwargs))
        self._self_target = target
        self._self_binds = binds

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None or not self._self_binds else MethodType(self, instance)

    def __copy__(self) -> Disguise:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Disguise:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        target = self._self_target
        return (getattr, (target.held, target.name)) if target.held is not MISSING else (resolve_name, (str(target),))
