"""Start of a Python with this folder on its path: applies `PATCHES_APPLY` (see `patches.run`).

Then it makes way for the `sitecustomize` that would have been imported without this one.
"""
# ruff: noqa: INP001, PTH100, PTH120 - a folder to put on a path, not a package; and pathlib costs time

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _apply() -> None:
    if not os.environ.get("PATCHES_APPLY"):
        return
    if importlib.util.find_spec("model_surgery_patches") is None:  # run from a checkout
        sys.path.append(os.path.dirname(os.path.dirname(_FOLDER)))
    try:
        run = importlib.import_module("model_surgery_patches.run")
    except ImportError as error:
        what = f"PATCHES_APPLY={os.environ['PATCHES_APPLY']}: {sys.executable} cannot import patches: {error!r}"
        os.write(2, f"patches: {what}; unset PATCHES_APPLY for this process, or install it there\n".encode())
        os._exit(2)
    run.apply_from_environment()


def _make_way() -> None:
    others = [place for place in sys.path if os.path.abspath(place) != _FOLDER]
    spec = PathFinder.find_spec(__name__, others)
    if spec is None or spec.loader is None:
        return
    module = sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_apply()
_make_way()
