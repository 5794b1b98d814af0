"""`acme.loud-join`: what `shlex.join` returns is in capitals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches


@patches.register("acme.loud-join", target="shlex:join", reason="the shell of this host is hard of hearing")
def loud_join(wrapped: Callable[..., str], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return wrapped(*args, **kwargs).upper()
