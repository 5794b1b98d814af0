"""Addresses: parsing the text that names a target."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any, Final

from .cell import MISSING
from .errors import TargetError

__all__ = ["Target", "parse", "refuse"]

_DOTTED: Final = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_TARGET: Final = re.compile(rf"({_DOTTED}):({_DOTTED})(?:\[(?P<key>.+)\]|\((?P<parameter>[^\W\d]\w*)\))?")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parsed target: the module, and the path inside it to the patched object."""

    module: str
    path: tuple[str, ...]
    key: Any = MISSING
    """The key of an item target, `module:path[key]`."""
    parameter: str | None = None
    """The parameter of a default argument target, `module:path(parameter)`."""

    @property
    def owner_path(self) -> tuple[str, ...]:
        """The path to the owner of the target: a module or class, a container, a function."""
        is_attribute = self.key is MISSING and self.parameter is None
        return self.path[:-1] if is_attribute else self.path

    @property
    def name(self) -> str:
        """The name of the target within its owner: an attribute, `[key]` or `(parameter)`."""
        if self.parameter is not None:
            return f"({self.parameter})"
        return self.path[-1] if self.key is MISSING else f"[{self.key!r}]"

    def __str__(self) -> str:
        owned = "" if self.owner_path != self.path else self.name
        return f"{self.module}:{'.'.join(self.path)}{owned}"


def parse(text: str) -> Target:
    """Split `package.module:Class.attribute`, `...:TABLE[key]`, or `...:function(parameter)`.

    A key is a Python literal, or else is taken as a string: `[3]`, `['3']`, `[relu]`. Raises TargetError if
    `text` has none of these forms.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        forms = "'package.module:Class.attribute', nor with [key] or (parameter) after it"
        raise refuse(text, f"it is not of the form {forms}")
    key = MISSING if match["key"] is None else _literal(match["key"])
    return Target(module=match[1], path=tuple(match[2].split(".")), key=key, parameter=match["parameter"])


def refuse(text: str, why: str) -> TargetError:
    """The error for a target that cannot be patched."""
    return TargetError(f"cannot patch {text!r}: {why}", target=text, why=why)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
