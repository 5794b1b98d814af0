"""A small package for others to patch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["PACKAGE", "forget", "make", "write"]

SOURCES = {
    "victim/__init__.py": """
        from os.path import join
        from .layers import Layer, Other
        from . import layers, functions
        answer = None
    """,
    "victim/functions.py": """
        import functools
        import math

        def scale(x, by=2, *, shift=0): return x * by + shift
        def plain(x): return x
        def decorated(x): return x
        def guarded(x): return x
        def bound(x): return x
        def mocked(x): return x
        def gone(x): return x
        def emptied(x): return x
        def recoded(x): return x
        @functools.lru_cache
        def cached(x): return x
        def own_decorator(function):
            @functools.wraps(function)
            def call(*args): return function(*args)
            return call
        floor = math.floor
        REGISTRY = {"relu": plain, "gelu": decorated}
        LIMIT = 3
        _lazy = None
    """,
    "victim/layers.py": """
        import functools

        class Layer:
            def forward(self, x): return x
            def backward(self, x): return x
            def extra(self, x): return x
            def __call__(self, x): return self.forward(x)
            def __init__(self): self.x = 1
            @classmethod
            def build(cls): return cls()
            @staticmethod
            def add(x, y): return x + y
            @property
            def size(self): return 1
            @property
            def weight(self): return 2
            @weight.setter
            def weight(self, value): return None
            @functools.cached_property
            def slow(self): return 3
            class Inner:
                def step(self): return 4

        class Other:
            def forward(self, x): return -x

        class Norm:
            def forward(self, x): return x

        class Masked:
            def forward(self, x): return x
    """,
    "victim/lazily.py": "def loaded_later(): return 1\n",
}
PACKAGE = "victim"


def make(folder: Path) -> ModuleType:
    """The package, written and imported."""
    write(folder, SOURCES)
    sys.path.insert(0, str(folder))
    return importlib.import_module(PACKAGE)


def forget(folder: Path) -> None:
    """Undo `make`, but for the files."""
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def write(folder: Path, sources: dict[str, str]) -> None:
    """The files, with the indentation of their first line taken away."""
    for path, text in sources.items():
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(line[indent:] for line in lines) + "\n")
