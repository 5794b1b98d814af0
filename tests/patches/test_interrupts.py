"""Ctrl-C may come between any two lines. Wherever it does, nothing stays."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import patches
from patches.activation import ACTIVATIONS
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import layers
from tests.helpers.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("unchanged")

# Where things change, and where they are protected.
CHANGING = {"activation.py", "forms.py", "ledger.py", "slot.py"}
PROTECTING = {"transaction.py", "undo.py"}
PACKAGE = Path(patches.__file__).parent


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that is run in some files of the package."""

    def __init__(self, at: int, files: set[str] = CHANGING) -> None:
        self.left = at
        self._files = files

    @contextmanager
    def armed(self) -> Iterator[None]:
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)
            # A line begins between the end of a `with` block and the release of its lock, where no signal is handled.
            lock: Any = ACTIVATIONS.lock
            while lock._is_owned():
                lock.release()

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        path = Path(frame.f_code.co_filename)
        return self._line if path.parent == PACKAGE and path.name in self._files else None

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


def block_interrupted(interrupter: Interrupter) -> None:
    with interrupter.armed(), patches.transaction(*declared(), reason="a test") as tx:
        tx.savepoint()


@pytest.mark.parametrize("dropped", [True, False])
def test_what_an_interrupt_leaves_is_undone_by_dropping_the_transaction_or_by_reverting_all(
    dropped: bool, unchanged: Snapshot
) -> None:
    """At every line of the transaction itself, its first and its last ones included."""
    lines = 0
    while True:
        lines += 1
        interrupter = Interrupter(lines, PROTECTING)
        try:
            block_interrupted(interrupter)
        except KeyboardInterrupt:
            if not dropped:
                patches.revert_all()
                assert (unchanged.differences(), patches.active()) == ([], []), f"after line {lines}"
        if patches.active():  # it may be in a cycle with its exception
            gc.collect()
        assert (unchanged.differences(), patches.active()) == ([], []), f"after line {lines}"
        if interrupter.left > 0:
            break
    assert lines > 50, "the interrupter must have hit the code"


def test_signals_at_random_moments_leave_nothing_that_cannot_be_undone() -> None:
    command = [sys.executable, "tools/trial_interrupts.py", "--signals", "300", "--json"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert found["signals"] + found["swallowed"] == 300
    assert found["signals"] > 200
    assert found["left"] == found["cleared_by_dropping"] + found["cleared_by_revert_all"]
    assert found["probability"] < 0.05
