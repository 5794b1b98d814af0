"""Drift: differences between the installed target and the one that a patch was written for."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any, Final

from .patch import Patch
from .signature import parse_signature, same_parameters
from .source import NoSourceError, chain, definitions, fingerprint
from .target import MISSING, Kind, Place

__all__ = ["find_drift", "find_foreign"]

_DESCRIPTOR_DECORATORS: Final = ("classmethod", "staticmethod", "property", "setter", "getter", "deleter", "overload")


def find_drift(patch: Patch, place: Place) -> tuple[str, ...]:
    """List each difference between the target and the patch's declaration, of source or signature, as one line."""
    return (*_compare_source(patch, place), *_compare_signature(patch, place))


def find_foreign(place: Place) -> tuple[str, ...]:
    """Report in one line that somebody else has replaced or wrapped the upstream object at a place; empty if not,
    or if it cannot be determined because upstream makes the object at run time.

    Found by the source file: a function is foreign if it comes from another line than its definition, or has more
    wrappers than its definition has decorators. For imported or assigned objects, only a mock is noticed:
    `patches.foreign` is more thorough, and slower.
    """
    if place.own is MISSING or place.kind in (Kind.VALUE, Kind.CLASS, Kind.ATTRIBUTE):
        return ()
    file, path = _origin(place)
    try:
        defined = definitions(file, path) if file else ()
    except NoSourceError:
        return ()
    links = chain(place.own)
    if not file or any(_made_by(node, links, file) for node in defined):
        return ()
    if not defined and _code_file(links[-1]) in (file, ""):
        return ()
    return (f"somebody else has patched it already: {_whereabouts(links[0])}",)


def _compare_source(patch: Patch, place: Place) -> Sequence[str]:
    if not patch.fingerprint:
        return ()
    try:
        found = fingerprint(place)
    except NoSourceError as error:
        return (f"its source cannot be compared: {error}",)
    if found in patch.fingerprint:
        return ()
    return (f"its source has changed: the fingerprint is {found}, expected {' or '.join(patch.fingerprint)}",)


def _compare_signature(patch: Patch, place: Place) -> Sequence[str]:
    if not patch.signature:
        return ()
    subject = chain(place.found)[-1] if place.found is not MISSING else None
    try:
        found = inspect.signature(subject)  # type: ignore[arg-type]  # None is refused with the TypeError
    except (TypeError, ValueError) as error:
        return (f"its signature cannot be compared: {error}",)
    if same_parameters(found, parse_signature(patch.signature)):
        return ()
    return (f"its signature has changed: it is {found}, expected {patch.signature}",)


def _origin(place: Place) -> tuple[str, tuple[str, ...]]:
    """The source file that defines the owner, or "", and the path to the target inside it."""
    if isinstance(place.owner, ModuleType):
        return _file_of(place.owner), (place.name,)
    if not isinstance(place.owner, type) or "<locals>" in place.owner.__qualname__:
        return "", ()
    module = sys.modules.get(place.owner.__module__)
    return _file_of(module), (*place.owner.__qualname__.split("."), place.name)


def _file_of(module: ModuleType | None) -> str:
    file = getattr(module, "__file__", None) or ""
    return file if file.endswith(".py") else ""


def _made_by(node: ast.AST, links: Sequence[Any], file: str) -> bool:
    """Whether the object can be the result of this statement of the source file."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return not _is_mock(links[0])  # an import or an assignment, of an unknown object
    decorators = [name for name in map(_decorator, node.decorator_list) if name not in _DESCRIPTOR_DECORATORS]
    if len(links) - 1 > len(decorators):
        return False
    if decorators and len(links) == 1:
        return not _is_mock(links[0])  # a decorator that hides the wrapped function
    first_line = min((node.lineno, *(item.lineno for item in node.decorator_list)))
    inner = links[-1]
    return type(inner) is FunctionType and (inner.__code__.co_filename, inner.__code__.co_firstlineno) == (
        file,
        first_line,
    )


def _decorator(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_mock(found: Any) -> bool:
    return type(found).__module__ == "unittest.mock"


def _code_file(found: Any) -> str:
    return found.__code__.co_filename if type(found) is FunctionType else ""


def _whereabouts(found: Any) -> str:
    code = found.__code__ if type(found) is FunctionType else None
    if code is None:
        wrapper = getattr(found, "_self_wrapper", None)  # set on a wrapt FunctionWrapper
        code = getattr(wrapper, "__code__", None)
    what = f"a {type(found).__name__}" if code is None or type(found) is not FunctionType else found.__qualname__
    return what if code is None else f"{what} from {code.co_filename}:{code.co_firstlineno}"
