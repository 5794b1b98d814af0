"""Drift: differences between the installed target and the one that a patch was written for, in source or signature."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from .target import MISSING, STORED, Kind, Place

if TYPE_CHECKING:
    from .patch import Patch

__all__ = [
    "NoSourceError",
    "chain",
    "find_drift",
    "find_foreign",
    "fingerprint",
    "parse_signature",
    "same_parameters",
]

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
    import hashlib

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


# Signatures -----------------------------------------------------------------------------------------------------------


@functools.cache
def parse_signature(text: str) -> inspect.Signature:
    """Parse `(self, x, *, by=2)` without evaluating anything: only the presence of a default is kept, not its value.

    Raises ValueError if `text` is not a signature.
    """
    try:
        function, *more = ast.parse(f"def signature{text}: ...").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not of the form '(self, x, *, by=2)'") from error
    if more or not isinstance(function, ast.FunctionDef) or not text.startswith("("):
        raise ValueError(f"{text!r} is not of the form '(self, x, *, by=2)'")
    return inspect.Signature(list(_parameters(function.args)))


def same_parameters(one: inspect.Signature, other: inspect.Signature) -> bool:
    """Whether the parameters agree in name, kind, order, and presence of a default. Annotations do not matter."""
    return _shape(one) == _shape(other)


def _shape(signature: inspect.Signature) -> list[tuple[str, Any, bool]]:
    parameters = signature.parameters.values()
    return [(item.name, item.kind, item.default is not item.empty) for item in parameters]


def _parameters(given: ast.arguments) -> Iterator[inspect.Parameter]:
    positional = (*given.posonlyargs, *given.args)
    for position, item in enumerate(positional):
        only = position < len(given.posonlyargs)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        yield _parameter(item, kind, has_default=position >= len(positional) - len(given.defaults))
    if given.vararg is not None:
        yield _parameter(given.vararg, inspect.Parameter.VAR_POSITIONAL, has_default=False)
    for item, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield _parameter(item, inspect.Parameter.KEYWORD_ONLY, has_default=default is not None)
    if given.kwarg is not None:
        yield _parameter(given.kwarg, inspect.Parameter.VAR_KEYWORD, has_default=False)


def _parameter(item: ast.arg, kind: Any, *, has_default: bool) -> inspect.Parameter:
    return inspect.Parameter(item.arg, kind, default=... if has_default else inspect.Parameter.empty)


# Comparison -----------------------------------------------------------------------------------------------------------

_DESCRIPTOR_DECORATORS: Final = ("classmethod", "staticmethod", "property", "setter", "getter", "deleter", "overload")


def find_drift(patch: Patch, place: Place) -> tuple[str, ...]:
    """List each difference between the target and the patch's declaration, of source or signature, as one line."""
    return (*_compare_source(patch, place), *_compare_signature(patch, place), *_compare_replacement(patch, place))


def find_foreign(place: Place) -> tuple[str, ...]:
    """Report in one line that somebody else has replaced or wrapped the upstream object at a place; empty if not,
    or if it cannot be determined because upstream makes the object at run time.

    Found by the source file: a function is foreign if it comes from another line than its definition, or has more
    wrappers than its definition has decorators. For imported or assigned objects, only a mock is noticed:
    `patches.foreign` is more thorough, and slower.
    """
    if place.own is MISSING or place.kind in (*STORED, Kind.ATTRIBUTE):
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


def _compare_replacement(patch: Patch, place: Place) -> Sequence[str]:
    if place.kind == Kind.CLASS and isinstance(patch.replace, type) and not issubclass(patch.replace, place.found):
        return (f"the replacement {patch.replace!r} is no subclass of {place.found!r}",)
    if patch.replace is MISSING or place.kind in (*STORED, Kind.ATTRIBUTE, Kind.PROPERTY) or place.found is MISSING:
        return ()
    try:
        stock, given = inspect.signature(chain(place.found)[-1]), inspect.signature(patch.replace)
    except (TypeError, ValueError):  # written in C: a mismatch shows when it is called
        return ()
    return () if _takes(given, stock) else (f"its signature is {stock}, and the replacement takes {given}",)


def _takes(given: inspect.Signature, stock: inspect.Signature) -> bool:
    """Whether every call that the stock function allows is one that the given one allows."""
    ours, theirs = _by_kind(given), _by_kind(stock)
    position, names = min(len(ours[1]), len(theirs[1])), {*ours[1], *ours[3]}
    required = [name for name in (*ours[1], *ours[3]) if given.parameters[name].default is inspect._empty]
    optional = {name for name, item in stock.parameters.items() if item.default is not inspect._empty}
    return (
        ours[1][:position] == theirs[1][:position]
        and (len(ours[1]) >= len(theirs[1]) or bool(ours[2] and ours[4]))
        and (bool(ours[4]) or names.issuperset(theirs[3]))
        and not set(required) - ({*theirs[1], *theirs[3]} - optional)
        and bool(ours[2]) >= bool(theirs[2])
        and bool(ours[4]) >= bool(theirs[4])
    )


def _by_kind(signature: inspect.Signature) -> dict[int, list[str]]:
    """The names of parameters: 1 positional, 2 `*args`, 3 keyword-only, 4 `**kwargs`."""
    kinds: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    for name, item in signature.parameters.items():
        kinds[max(1, int(item.kind))].append(name)
    return kinds


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
