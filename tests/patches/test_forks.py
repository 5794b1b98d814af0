"""A child may be forked while any thread is anywhere in the registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, declare
from tests.helpers.fake_upstream import functions

pytestmark = pytest.mark.usefixtures("unchanged")


def test_no_child_hangs_that_is_forked_while_threads_churn() -> None:
    command = [sys.executable, "-m", "tests.helpers.fork_storm", "50", "5"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout) == {"ended": 50, "left": 0}, ran.stderr[-2000:]


def forked(work: Any) -> int:
    """The exit status of a child that does `work`, or -1 if it hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the parent's pytest must not see it
            os._exit(1)
        os._exit(0)
    timer = threading.Timer(10, os.kill, (pid, 9))
    timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    timer.cancel()
    return -1 if status == -9 else status


class Waiting(type):
    """Classes that wait, once told to, when an attribute is set: then the registry is in the middle of a change."""

    inside, go_on = threading.Event(), threading.Event()
    parent = os.getpid()

    def __setattr__(cls, name: str, value: object) -> None:
        if os.getpid() == Waiting.parent and threading.current_thread() is not threading.main_thread():
            Waiting.inside.set()
            Waiting.go_on.wait(30)
        super().__setattr__(name, value)


class Slow(metaclass=Waiting):
    def run(self) -> int:
        return 1


def test_a_child_of_a_thread_that_holds_the_registry_can_use_it() -> None:
    slow = declare("slow", f"{__name__}:Slow.run")
    inside, go_on = Waiting.inside, Waiting.go_on
    thread = threading.Thread(target=lambda: patches.transaction(slow, reason="a test").__enter__().rollback())
    thread.start()
    assert inside.wait(30)

    def child() -> None:
        with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="a test"):
            assert functions.scale(2) == ("a", 4)
        assert functions.scale(2) == 4

    status = forked(child)
    go_on.set()
    thread.join()
    assert status == 0
    assert "run" in vars(Slow)
    assert Slow().run() == 1


def test_a_child_may_ask_the_probe_that_a_thread_is_asking() -> None:
    asked, go_on = threading.Event(), threading.Event()
    parent = os.getpid()

    def probe() -> bool:
        asked.set()
        return os.getpid() != parent or go_on.wait(30)

    patch = declare("probed", f"{FUNCTIONS}:scale", probe=probe)
    thread = threading.Thread(target=patches.verdict, args=(patch,))
    thread.start()
    assert asked.wait(30)
    status = forked(lambda: patches.transaction(patch, reason="a test").__enter__().rollback())
    go_on.set()
    thread.join()
    assert status == 0


def test_what_is_active_stays_so_in_the_child() -> None:
    def child() -> None:
        assert functions.scale(2) == ("a", 4)
        assert [row.id for row in patches.audit()] == ["fake.a"]
        patches.revert_all()
        assert functions.scale(2) == 4

    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="a test"):
        assert forked(child) == 0
        assert functions.scale(2) == ("a", 4), "the child's undo is its own"


def test_a_child_that_inherits_a_counted_patch_is_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATCHES_JOURNAL", str(tmp_path))
    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="a test", count_calls=True):
        assert forked(lambda: functions.scale(2)) == 0
        assert caplog.text == ""
        assert [process.pid == os.getpid() for process in patches.read_journals(tmp_path)].count(False) == 1
