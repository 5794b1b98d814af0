"""Upstream source of a target, whatever has been wrapped around it since."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any, Final
from weakref import WeakKeyDictionary

from .target import MISSING, Kind, Place

__all__ = ["NoSourceError", "chain", "definitions", "fingerprint"]

_MAX_DEPTH: Final = 32
_LITERALS: Final = (bool, int, float, complex, str, bytes, type(None))
_fingerprints: Final[WeakKeyDictionary[Any, str]] = WeakKeyDictionary()


class NoSourceError(Exception):
    """An object has no Python source: it is written in C, or was made by `exec`."""


def chain(found: Any) -> list[Any]:
    """List `found` and the functions that it wraps, outermost first.

    Follows descriptors, `__wrapped__`, partials and bound methods.
    """
    links: list[Any] = []
    while found is not None and len(links) < _MAX_DEPTH:
        if isinstance(found, property):
            found = found.fget or found.fset
        elif type(found) in (classmethod, staticmethod):  # their `__wrapped__` is the same function
            found = found.__func__
        else:
            links.append(found)
            found = _next(found)
    return links


def fingerprint(place: Place) -> str:
    """Hash the upstream source of a place's function, class, or literal value to 16 hexadecimal digits.

    Comments, docstrings, formatting and the version of Python do not matter, and wrappers are ignored. Cached per
    function. Raises NoSourceError.
    """
    if place.kind == Kind.VALUE:
        return _fingerprint_of_value(place.found)
    subject = place.owner if place.found is MISSING else chain(place.found)[-1]
    try:
        if subject not in _fingerprints:
            _fingerprints[subject] = _digest(_parse(subject))
        return _fingerprints[subject]
    except TypeError as error:  # not a Python function or class, or one that cannot be referenced weakly
        raise NoSourceError(f"{subject!r} has no Python source") from error


@functools.cache
def definitions(file: str, path: tuple[str, ...]) -> tuple[ast.AST, ...]:
    """Find every definition of `path` (`("Class", "method")`) in a source file, such as in both branches of an `if`.

    Functions and classes, and statements that import the name or assign to it. Cached per file and path. Raises
    NoSourceError.
    """
    scopes: list[ast.AST] = [_parse_file(file)]
    for name in path[:-1]:
        inner = [node for scope in scopes for node in _statements(scope) if name in _names(node)]
        scopes = [node for node in inner if isinstance(node, ast.ClassDef)]
    return tuple(node for scope in scopes for node in _statements(scope) if path[-1] in _names(node))


def _next(found: Any) -> Any:
    if isinstance(found, functools.partial):
        return found.func
    # In the `__dict__` of a function, or on the class of a wrapt proxy; classes have none, and mocks have everything.
    if isinstance(found, type):
        return None
    if type(found) is FunctionType:
        return vars(found).get("__wrapped__")
    wrapped = inspect.getattr_static(found, "__wrapped__", None)
    return found.__wrapped__ if wrapped is not None else inspect.getattr_static(found, "__func__", None)


def _fingerprint_of_value(value: Any) -> str:
    if not _is_literal(value):
        raise NoSourceError(f"a {type(value).__name__} is no literal")
    return _hash(repr(value))


def _is_literal(value: Any) -> bool:
    if type(value) is dict:
        return _is_literal([*value.keys(), *value.values()])
    if type(value) in (tuple, list):
        return all(map(_is_literal, value))
    return type(value) in _LITERALS


def _parse(subject: Any) -> ast.AST:
    if not isinstance(subject, FunctionType | type):
        raise NoSourceError(f"{subject!r} is no Python function or class")
    try:
        source = inspect.getsource(subject)
        # An indented definition is kept indented: dedenting would change string literals that span lines.
        body = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source).body
    except (OSError, SyntaxError) as error:
        raise NoSourceError(f"{subject!r} has no source: {error}") from error
    node = body[0]
    return node.body[0] if isinstance(node, ast.If) else node


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
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(node)


def _names(node: ast.AST) -> set[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return set()


def _digest(node: ast.AST) -> str:
    return _hash(_dump(node))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dump(node: Any) -> str:
    """Dump a node like `ast.dump`, but without empty fields, so that fields added by a later Python change nothing."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment", "ctx")]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        fields = [(name, _without_docstring(value) if name == "body" else value) for name, value in fields]
    present = (f"{name}={_dump(value)}" for name, value in fields if value is not None and value != [])
    return f"{type(node).__name__}({','.join(present)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body
