"""Drift: differences between the installed target and the one that a patch was written for, in source or signature."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from .target import MISSING, STORED, Kind, Place

if TYPE_CHECKING:
    from .patch import Patch

__all__ = ["NoSourceError", "chain", "find_drift", "fingerprint", "parse_signature", "same_parameters"]

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
    if place.kind == Kind.VALUE and not _is_literal(place.found):
        raise NoSourceError(f"a {type(place.found).__name__} is no literal")
    if place.kind == Kind.VALUE:
        return _hash(repr(place.found))
    subject = place.owner if place.found is MISSING else chain(place.found)[-1]
    try:
        if subject not in _fingerprints:
            _fingerprints[subject] = _hash(_dump(_parse(subject)))
        return _fingerprints[subject]
    except TypeError as error:  # not a Python function or class, or one that cannot be referenced weakly
        raise NoSourceError(f"{subject!r} has no Python source") from error


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
    text = body[0].value if isinstance(body[0], ast.Expr) else None
    return body[1:] if isinstance(text, ast.Constant) and isinstance(text.value, str) else body


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
    shapes = [
        [(item.name, item.kind, item.default is item.empty) for item in signature.parameters.values()]
        for signature in (one, other)
    ]
    return shapes[0] == shapes[1]


def _parameters(given: ast.arguments) -> Iterator[inspect.Parameter]:
    kinds, first = inspect._ParameterKind, len(given.posonlyargs)
    required = first + len(given.args) - len(given.defaults)
    defaults = [*[None] * required, *given.defaults]
    groups: tuple[tuple[Any, Sequence[ast.arg | None], Sequence[ast.expr | None]], ...] = (
        (kinds.POSITIONAL_ONLY, given.posonlyargs, defaults[:first]),
        (kinds.POSITIONAL_OR_KEYWORD, given.args, defaults[first:]),
        (kinds.VAR_POSITIONAL, [given.vararg], [None]),
        (kinds.KEYWORD_ONLY, given.kwonlyargs, given.kw_defaults),
        (kinds.VAR_KEYWORD, [given.kwarg], [None]),
    )
    for kind, items, values in groups:
        for item, value in zip(items, values, strict=True):
            if item is not None:
                yield inspect.Parameter(item.arg, kind, default=inspect.Parameter.empty if value is None else ...)


# Comparison -----------------------------------------------------------------------------------------------------------


def find_drift(patch: Patch, place: Place) -> tuple[str, ...]:
    """List each difference between the target and the patch's declaration, of source or signature, as one line."""
    return (*_compare_source(patch, place), *_compare_signature(patch, place), *_compare_replacement(patch, place))


def _compare_source(patch: Patch, place: Place) -> tuple[str, ...]:
    if not patch.fingerprint:
        return ()
    try:
        found = fingerprint(place)
    except NoSourceError as error:
        return (f"its source cannot be compared: {error}",)
    if found in patch.fingerprint:
        return ()
    return (f"its source has changed: the fingerprint is {found}, expected {' or '.join(patch.fingerprint)}",)


def _compare_signature(patch: Patch, place: Place) -> tuple[str, ...]:
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


def _compare_replacement(patch: Patch, place: Place) -> tuple[str, ...]:
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
