"""The import hook: a callback after the first execution of a watched module.

wrapt's hooks are not used, because they cannot be removed, and an error in one fails the import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["ImportHook"]


class ImportHook(MetaPathFinder):
    """A finder that finds nothing itself, but wraps the loaders of the watched modules.

    It is in `sys.meta_path` only while there are watched modules. A module that is already imported, or that
    `importlib.reload` executes again, causes no callback.
    """

    def __init__(self, executed: Callable[[str], None]) -> None:
        """Take `executed(name)`, called in the importing thread with the import lock of the module held."""
        self._executed = executed
        self._names: frozenset[str] = frozenset()

    def watch(self, names: frozenset[str]) -> None:
        """Watch exactly these modules from now on."""
        self._names = names
        # The list is replaced as a whole, since another thread may be iterating over it.
        others = [finder for finder in sys.meta_path if finder is not self]
        sys.meta_path[:] = [self, *others] if names else others

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec from the finders after this one, with a loader that reports when it is done."""
        if fullname not in self._names:
            return None
        spec = self._ask_others(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Telling(spec.loader, self._executed)
        return spec

    def _ask_others(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Telling(Loader):
    """A loader that delegates to `loader`, then runs the callback. The module ends up with the original `loader`."""

    def __init__(self, loader: Any, executed: Callable[[str], None]) -> None:
        self._loader = loader
        self._executed = executed

    def __getattr__(self, name: str) -> Any:
        # A caller of `importlib.util.find_spec` may have this loader and ask it for the source.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with the original loader."""
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then run the callback; not if execution raises, since the import may be tried again."""
        name, spec = module.__name__, module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._executed(name)
