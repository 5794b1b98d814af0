"""`acme.deep-indent`: `textwrap.indent` indents twice as far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches


def deep_indent(wrapped: Callable[..., str], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    text, prefix, *rest = args
    return wrapped(text, 2 * prefix, *rest, **kwargs)


PATCH = patches.Patch(
    id="acme.deep-indent", target="textwrap:indent", wrapper=deep_indent, reason="one level is hard to see"
)
