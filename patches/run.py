"""Patches from outside: a Python process applies what its environment names, and so do the processes that it starts.

    env = patches.run.environment("mylib.fast-norm", imports=["my_project.patches"])
    subprocess.run([sys.executable, "serve.py"], env=env)

`PATCHES_APPLY` holds ids, bundles or selectors, separated by commas, and `PATCHES_IMPORT` the modules that register
them. Python reads neither: it imports `sitecustomize` at its start, and `PYTHONPATH` leads it to ours, in `startup`.
There the patches are deferred, so that each is applied when its target is imported, whoever does that first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Final

from .deferred import Deferred, defer
from .errors import PatchError
from .plan import expand
from .registry import ENTRY_POINT_GROUP, REGISTRY
from .slot import in_order, refuse_conflicts

__all__ = ["apply_from_environment", "command", "environment", "offer"]

_APPLY: Final = "PATCHES_APPLY"
_IMPORT: Final = "PATCHES_IMPORT"
_FOLDER: Final = "PATCHES_FOLDER"
_STARTUP: Final = os.path.join(os.path.dirname(__file__), "startup")  # noqa: PTH118, PTH120 - costs an import


def environment(*selectors: str, imports: Iterable[str] = (), base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment `base`, in which every Python process applies these patches, besides those it names already.

    `imports` are the modules that register them; they are looked for in the current folder too. Raises
    PatchError if one of them cannot be imported, or a patch is unknown, or they cannot be active together. The
    libraries that are patched are not imported.
    """
    chosen = list(dict.fromkeys([*_words(base, _APPLY), *selectors]))
    modules = list(dict.fromkeys([*_words(base, _IMPORT), *imports]))
    if not chosen:
        raise PatchError(f"expected ids of patches to apply, got none; name them with --apply, or set {_APPLY}")
    folder = base.get(_FOLDER) or os.getcwd()  # noqa: PTH109 - as above
    with _imported(modules, folder):
        found = [patch for patch, _ in expand(chosen)]
    refuse_conflicts(found)
    in_order(found)
    path = base.get("PYTHONPATH", "")
    if _STARTUP not in path.split(os.pathsep):
        path = f"{_STARTUP}{os.pathsep}{path}" if path else _STARTUP
    return {**base, _APPLY: ",".join(chosen), _IMPORT: ",".join(modules), _FOLDER: folder, "PYTHONPATH": path}


def command(arguments: Sequence[str]) -> list[str]:
    """The command line that runs `script.py ...`, `-m module ...` or `-c code ...` in this Python, or any program.

    Raises PatchError for options of Python, some of which (-I, -E, -S) would have it ignore its environment.
    """
    first = arguments[0]
    what = "a script, -m module, -c code or a program"
    if first.startswith("-") and not first.startswith(("-m", "-c")):
        raise PatchError(f"expected {what} to run, found {first!r}; set options of Python by its variables, PYTHON...")
    import shutil

    if not first.startswith(("-m", "-c")) and not first.endswith(".py"):
        if shutil.which(first):
            return list(arguments)
        if not os.path.exists(first):  # noqa: PTH110 - as above
            raise PatchError(f"expected {what} to run, found {first!r}: no file here, and no program on the PATH")
    return [sys.executable, *arguments]


@cache
def apply_from_environment() -> Deferred | None:
    """Defer what the environment names, once in a process; None if it names nothing. Called at the start of Python.

    If that fails, the process ends with exit code 2, and says why: it was to be patched, and nobody would notice.
    """
    chosen = _words(os.environ, _APPLY)
    if not chosen:
        return None
    try:
        folder = os.environ.get(_FOLDER) or os.getcwd()  # noqa: PTH109 - as above
        with _imported(_words(os.environ, _IMPORT), folder):
            return defer(*chosen, reason=f"{_APPLY}={','.join(chosen)}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - importing may raise anything, and Python would go on without
        text = str(error) if isinstance(error, PatchError) else repr(error)
        what = f"patches: {_APPLY}={','.join(chosen)}: {text}; unset {_APPLY} to start without"
        with contextlib.suppress(OSError):
            os.write(2, f"{what}: {sys.orig_argv}\n".encode(errors="backslashreplace"))
        os._exit(2)


def offer(folder: str) -> None:
    """Let patches be found by the entry points in the `pyproject.toml` of a folder that is not installed."""
    try:
        with open(os.path.join(folder, "pyproject.toml"), "rb") as file:  # noqa: PTH118, PTH123 - as above
            text = file.read().decode()
    except (OSError, ValueError):
        return
    if ENTRY_POINT_GROUP not in text:
        return
    import tomllib
    from importlib.metadata import EntryPoint

    try:
        points = tomllib.loads(text)["project"]["entry-points"][ENTRY_POINT_GROUP]
    except (ValueError, KeyError, TypeError):
        return
    REGISTRY.offer(EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in points.items())


@contextlib.contextmanager
def _imported(modules: Iterable[str], folder: str) -> Iterator[None]:
    """Import modules, which within the block are looked for in a folder too, if they are nowhere else."""
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    offer(folder)
    try:
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                why = f"{module!r}, which is to register patches, cannot be imported: {error}"
                raise PatchError(why) from error
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _words(environment: Mapping[str, str], variable: str) -> list[str]:
    return [word.strip() for word in environment.get(variable, "").split(",") if word.strip()]
