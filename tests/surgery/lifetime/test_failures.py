"""Whatever fails, wherever an interrupt comes: nothing stays patched."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import patches
import surgery
from surgery import bound
from surgery.checkpoint import Reader
from surgery.passes import install, lifetime, prepare
from surgery.passes.adapt import Adapt
from surgery.passes.exchange import Exchange
from surgery.passes.quantize import Quantize
from surgery.passes.read import Read
from surgery.passes.record import Record
from surgery.passes.relocate import Relocate
from surgery.passes.replace import Replace
from tests.helpers.snapshot import Snapshot
from tests.surgery.lifetime.behaviour import InjectedError, assert_stock, build, run

ERRORS = [InjectedError("injected"), KeyboardInterrupt()]

#: What is called, and when it fails; half of these run in the thread that loads.
PLACES: list[tuple[Any, str, int]] = [
    (prepare, "build_on_meta", 1),
    (Replace, "run", 1),
    (Reader, "read_bytes", 4),
    (Read, "run_batch", 1),
    (Quantize, "run_batch", 1),
    (Exchange, "run_batch", 1),
    (Record, "run_batch", 1),
    (Relocate, "run_batch", 1),
    (Adapt, "run", 1),
    (install, "install", 1),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_failure_in_any_pass(
    tiny: Path,
    unchanged: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[Any, str, int],
    error: BaseException,
) -> None:
    owner, name, nth = place
    stock, calls, active = getattr(owner, name), [0], []

    def fails(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            active.extend(patches.active())
            raise error
        return stock(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(BaseException) as caught:  # noqa: PT011  # its kind is asserted below
            build(tiny)
    assert caught.value is error or caught.value.__cause__ is error
    assert isinstance(error, KeyboardInterrupt) is isinstance(caught.value, KeyboardInterrupt)
    assert {receipt.id for receipt in active} == {"torch.meta-param-replacement"}
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("surgery-")] == []
    assert_stock(unchanged)


def test_failure_after_the_last_pass(tiny: Path, unchanged: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module) -> None:
        assert len(patches.active()) >= len(patches.select("linear4bit-resident"))
        raise InjectedError("injected")

    monkeypatch.setattr(bound, "as_context_manager", fails)
    with pytest.raises(InjectedError):
        build(tiny)
    assert_stock(unchanged)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failure_in_the_block(tiny: Path, unchanged: Snapshot, error: BaseException) -> None:
    def job() -> None:
        with build(tiny) as model:
            run(model).sum().backward()
            raise error

    with pytest.raises(type(error)):
        job()
    assert_stock(unchanged)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line run of where a fill ends: in `fill` and `lifetime`."""

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
        code = frame.f_code
        is_end = code is bound.fill.__code__ or code.co_filename == lifetime.__file__
        return self._line if is_end else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._line


def interrupted_at(line: int, checkpoint: Path) -> bool:
    """Whether building was interrupted there, and not complete before; a complete model is released."""
    try:
        with Interrupter(line).armed():
            model = build(checkpoint, lora=None, model=lambda: nn.Sequential(nn.Linear(64, 64, bias=False)))
    except KeyboardInterrupt:
        return True
    surgery.release(model)
    return False


def test_interrupt_at_any_line_of_the_end(tmp_path: Path, unchanged: Snapshot) -> None:
    save_file({"0.weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    line = 1
    while interrupted_at(line, tmp_path):
        gc.collect()
        assert_stock(unchanged)
        line += 1
    assert line > 12
