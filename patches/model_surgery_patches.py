"""`patches` under a name that nobody else has, for programs beside which there may be another `patches`.

`import model_surgery_patches as patches` gives the very module that `import patches` gives, submodules included. Where
`import patches` leads to a file of somebody else, this module becomes the package itself, and `__shadowed_by__` in it
names that file.

It is installed beside the package; in a checkout a link at the root stands for that. Inside of the package it marks
the folder as ours.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from patches import *  # noqa: F403 - the names of this module are those of the package

_NAMES: Final = ("patches", "model_surgery_patches")
_HERE: Final = Path(__file__).resolve()
_BESIDE: Final = _HERE.with_name("patches")
_INIT: Final = (_BESIDE if (_BESIDE / _HERE.name).exists() else _HERE.parent) / "__init__.py"


class _OtherName(Loader, MetaPathFinder):
    """Finder and loader of the package and its modules by the one of its two names that is not `own`.

    First in `sys.meta_path`: other finders would load the files a second time.
    """

    def __init__(self, own: str) -> None:
        self._own = own

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, dot, _ = fullname.partition(".")
        if top not in _NAMES or top == self._own:
            return None
        package = sys.modules.get(self._own)
        is_same = sys.modules.get(top) is package if dot else _is_ours(_file_of_patches())
        own = self._own + fullname.removeprefix(top)
        if not is_same or (own not in sys.modules and find_spec(own) is None):
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._own + spec.name.removeprefix(spec.name.partition(".")[0]))
        spec.loader_state = module.__spec__  # which the import system replaces
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = module.__spec__.loader_state


def _file_of_patches() -> str | None:
    """The file that `import patches` leads to; None if it leads nowhere."""
    if "patches" in sys.modules:
        return getattr(sys.modules["patches"], "__file__", None)
    if "_pytest.config" in sys.modules:
        # pytest puts the folders of tests in front of sys.path, but only after plugins such as ours are loaded.
        for file in (Path("patches.py"), Path("patches", "__init__.py")):
            if file.exists():
                return str(file.resolve())
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _OtherName)]
    specs = (finder.find_spec("patches", None) for finder in finders)
    return next((spec.origin for spec in specs if spec is not None), None)


def _is_ours(file: str | None) -> bool:
    return file is not None and Path(file).name == "__init__.py" and Path(file).with_name(_HERE.name).exists()


def _load() -> None:
    found = _file_of_patches()
    own = _NAMES[0] if _is_ours(found) else _NAMES[1]
    sys.meta_path.insert(0, _OtherName(own))
    if own == "patches":
        sys.modules[__name__] = importlib.import_module("patches")
        return
    assert __spec__ is not None
    __spec__.submodule_search_locations = [str(_INIT.parent)]
    globals().update(
        __path__=__spec__.submodule_search_locations, __package__=__name__, __file__=str(_INIT), __shadowed_by__=found
    )
    SourceFileLoader(__name__, str(_INIT)).exec_module(sys.modules[__name__])


if __name__ == "__main__":  # python -m model_surgery_patches
    importlib.import_module("model_surgery_patches.__main__").main()
else:
    _load()
