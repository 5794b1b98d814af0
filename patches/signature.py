"""Declared signatures of patches, and their comparison with those of functions."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from typing import Any

__all__ = ["parse_signature", "same_parameters"]


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
