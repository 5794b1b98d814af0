"""Ctrl-C may come between any two lines. Wherever it does, nothing stays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import layers
from tests.helpers.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("unchanged")

# Where things change. In the first lines of `__exit__` an interrupt finds nothing undone yet, and Python does
# not call it again.
CHANGING = {"activation.py", "compose.py", "ledger.py", "link.py", "slot.py"}
PACKAGE = Path(patches.__file__).parent


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that is run in those files."""

    def __init__(self, at: int) -> None:
        self.left = at

    @contextmanager
    def armed(self) -> Iterator[None]:
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        path = Path(frame.f_code.co_filename)
        return self._line if path.parent == PACKAGE and path.name in CHANGING else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._line


def declared() -> list[Any]:
    return [
        declare("a", f"{FUNCTIONS}:scale"),
        patches.on(declare("b", f"{LAYERS}:Base.forward"), [layers.Base]),
        declare("c", f"{LAYERS}:Derived.forward"),
    ]


def enter_interrupted(interrupter: Interrupter) -> None:
    with interrupter.armed():
        tx = patches.transaction(*declared(), reason="a test").__enter__()
    tx.__exit__(None, None, None)


def exit_interrupted(interrupter: Interrupter) -> None:
    tx = patches.transaction(*declared(), reason="a test").__enter__()
    with interrupter.armed():
        tx.__exit__(None, None, None)


@pytest.mark.parametrize("interrupted", [enter_interrupted, exit_interrupted])
def test_an_interrupt_at_any_line_leaves_nothing(
    interrupted: Callable[[Interrupter], None], unchanged: Snapshot
) -> None:
    lines = 0
    while True:
        lines += 1
        interrupter = Interrupter(lines)
        try:
            interrupted(interrupter)
        except KeyboardInterrupt:
            assert (unchanged.differences(), patches.active()) == ([], []), f"after line {lines}"
            continue
        break
    assert lines > 100, "the interrupter must have hit the code"
    assert interrupter.left > 0
