"""Foreign patches of one target, found by its source file: quick, and less thorough than a clean process."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, Final

from ..drift import NoSourceError, chain
from ..target import MISSING, STORED, Kind, Place
from .describe import is_mock

__all__ = ["find_foreign"]

_DESCRIPTOR_DECORATORS: Final = ("classmethod", "staticmethod", "property", "setter", "getter", "deleter", "overload")
_DEFINITIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def find_foreign(place: Place) -> tuple[str, ...]:
    """Report in one line that somebody else has replaced or wrapped the upstream object at a place; empty if not,
    or if it cannot be determined because upstream makes the object at run time.

    A function is foreign if it comes from another line than its definition, or has more wrappers than its definition
    has decorators. For imported or assigned objects, only a mock is noticed.
    """
    if place.own is MISSING or place.kind in (*STORED, Kind.ATTRIBUTE):
        return ()
    file, path = _origin(place)
    links = chain(place.own)
    code = links[0].__code__ if len(links) == 1 and type(links[0]) is FunctionType else None
    if code is not None and (code.co_filename, code.co_qualname) == (file, ".".join(path)):
        return ()  # evidently its own; reading the source takes tens of milliseconds
    try:
        defined = _definitions(file, path) if file else ()
    except NoSourceError:
        return ()
    if not file or any(_made_by(node, links, file) for node in defined):
        return ()
    if not defined and (type(links[-1]) is not FunctionType or links[-1].__code__.co_filename == file):
        return ()
    return (f"somebody else has patched it already: {_whereabouts(links[0])}",)


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


@functools.cache
def _definitions(file: str, path: tuple[str, ...]) -> tuple[ast.AST, ...]:
    """Find every definition of `path` (`("Class", "method")`) in a source file, such as in both branches of an `if`.

    Functions and classes, and statements that import the name or assign to it. Raises NoSourceError.
    """
    scopes: list[ast.AST] = [_parse_file(file)]
    for name in path[:-1]:
        inner = [node for scope in scopes for node in _statements(scope) if name in _names(node)]
        scopes = [node for node in inner if isinstance(node, ast.ClassDef)]
    return tuple(node for scope in scopes for node in _statements(scope) if path[-1] in _names(node))


@functools.cache
def _parse_file(file: str) -> ast.Module:
    try:
        with open(file, "rb") as stream:  # noqa: PTH123 - pathlib is not imported by this package
            return ast.parse(stream.read())
    except (OSError, SyntaxError, ValueError) as error:
        raise NoSourceError(f"{file} cannot be read: {error}") from error


def _statements(scope: ast.AST) -> Iterator[ast.AST]:
    """The statements of a scope, including branches and loops, but not nested functions and classes."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.stmt | ast.ExceptHandler):
            continue
        yield node
        if not isinstance(node, _DEFINITIONS):
            yield from _statements(node)


def _names(node: ast.AST) -> set[str]:
    """The names that a statement binds."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return set()


def _made_by(node: ast.AST, links: Sequence[Any], file: str) -> bool:
    """Whether the object can be the result of this statement of the source file."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return not is_mock(links[0])  # an import or an assignment, of an unknown object
    decorators = [name for name in map(_decorator, node.decorator_list) if name not in _DESCRIPTOR_DECORATORS]
    if len(links) - 1 > len(decorators):
        return False
    if decorators and len(links) == 1:
        return not is_mock(links[0])  # a decorator that hides the wrapped function
    first_line = min((node.lineno, *(item.lineno for item in node.decorator_list)))
    code = links[-1].__code__ if type(links[-1]) is FunctionType else None
    return code is not None and (code.co_filename, code.co_firstlineno) == (file, first_line)


def _decorator(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _whereabouts(found: Any) -> str:
    if type(found) is FunctionType:
        return f"{found.__qualname__} from {found.__code__.co_filename}:{found.__code__.co_firstlineno}"
    code = getattr(getattr(found, "_self_wrapper", None), "__code__", None)  # of a wrapt FunctionWrapper
    what = f"a {type(found).__name__}"
    return what if code is None else f"{what} from {code.co_filename}:{code.co_firstlineno}"
