"""The import hook: a call once a module that is waited for has been executed for the first time.

Own, because wrapt's hooks cannot be taken back, and an error in one fails the import.
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
    """A finder that finds nothing itself: it watches the loaders of the modules that are waited for.

    In `sys.meta_path` only while there is one. A module that is imported already, or is executed again by
    `importlib.reload`, makes no call.
    """

    def __init__(self, executed: Callable[[str], None]) -> None:
        """`executed(name)` is called in the importing thread, with the import lock of that module held."""
        self._executed = executed
        self._names: frozenset[str] = frozenset()

    def watch(self, names: frozenset[str]) -> None:
        """Wait for these modules, and for no other any more."""
        self._names = names
        # The list is replaced as a whole: another thread may be going through it.
        others = [finder for finder in sys.meta_path if finder is not self]
        sys.meta_path[:] = [self, *others] if names else others

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the finders after this one say, with a loader that tells when it is done."""
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
    """Loads as `loader` does, then tells. The module is left with `loader`, as if it had never been otherwise."""

    def __init__(self, loader: Any, executed: Callable[[str], None]) -> None:
        self._loader = loader
        self._executed = executed

    def __getattr__(self, name: str) -> Any:
        # `importlib.util.find_spec` may have handed this to somebody who asks the loader for the source.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then tell. Nothing is told where executing it raises: the import may be tried again."""
        name, spec = module.__name__, module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._executed(name)
