"""Loading in the background: its errors come to whoever waits, and it never outlives the block, Ctrl-C or not."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import patches
import surgery
from surgery.checkpoint import Reader, TensorEntry
from surgery.comm.background import in_background, undisturbed
from surgery.comm.ranks import StoppedError
from surgery.passes.loading import Staging

CPU = torch.device("cpu")


class InjectedError(Exception):
    """Raised by the tests."""


def surgery_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("surgery")]


@pytest.mark.parametrize("error", [InjectedError("injected"), KeyboardInterrupt()], ids=repr)
def test_an_error_comes_to_who_waits(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with in_background(fail, stop=threading.Event(), device=CPU) as background:
        with pytest.raises(type(error)) as caught:
            background.wait()
        assert caught.value is error


def test_an_error_that_nobody_waits_for_does_not_hide_another() -> None:
    def fail() -> None:
        raise InjectedError("in the thread")

    with pytest.raises(InjectedError, match="in the block"), in_background(fail, stop=threading.Event(), device=CPU):
        raise InjectedError("in the block")


def test_leaving_the_block_stops_the_work_and_waits_for_it() -> None:
    stop, ended = threading.Event(), threading.Event()

    def work() -> None:
        stop.wait()
        time.sleep(0.05)
        ended.set()
        raise StoppedError("as asked")

    with in_background(work, stop=stop, device=CPU):
        assert surgery_threads() == ["surgery-load"]
        assert not ended.is_set()
    assert ended.is_set()
    assert surgery_threads() == []


def test_nothing_is_recorded_for_backward() -> None:
    found = []
    with in_background(lambda: found.append(torch.is_grad_enabled()), stop=threading.Event(), device=CPU) as background:
        background.wait()
        assert torch.is_grad_enabled()
    assert found == [False]


def test_the_interpreter_is_as_before_after_an_undisturbed_block() -> None:
    gc.enable()
    threads = torch.get_num_threads()
    with undisturbed(torch.device("cuda")):
        assert not gc.isenabled()
        assert torch.get_num_threads() == 1
    assert gc.isenabled()
    assert torch.get_num_threads() == threads


def test_ctrl_c_while_loading_ends_all_threads(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal, when the main thread has nothing to do but wait."""
    stock, begun = Reader.read_bytes, []

    def slowly(reader: Reader, entry: TensorEntry, out: memoryview, **where: Any) -> None:
        begun.append(entry.name)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        stock(reader, entry, out, **where)

    staging = Staging(elements=4096, buffers=1, threads=1, layer_elements=1000)
    monkeypatch.setattr(Staging, "on", lambda *args, **options: staging)
    monkeypatch.setattr(Reader, "read_bytes", slowly)
    # A shell that starts tests in the background has them ignore the signal, and then Python does not handle it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            surgery.qlora(tiny, report=surgery.Report())
    finally:
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(begun) < len(surgery.Checkpoint.open(tiny).names())
    assert surgery_threads() == []
    assert patches.active() == []
