"""Where the numbers go."""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from surgery.errors import ConfigError
from surgery.finetune.loop import StepMetrics
from surgery.finetune.options import require_loggers
from surgery.finetune.trackers import JsonlTracker, ProgressTracker, open_trackers


def metrics(step: int, *, grad_norm: float = 0.25) -> StepMetrics:
    return StepMetrics(step=step, loss=1.5, lr=1e-4, grad_norm=grad_norm, tokens=100, seconds=0.5)


def test_one_json_object_a_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.on_evaluation(0, 2.0)
    tracker.on_step(metrics(1))
    first = json.loads(path.read_text())
    assert first == {
        "step": 1, "loss": 1.5, "lr": 1e-4, "grad_norm": 0.25, "tokens_per_s": 200.0, "tokens": 100, "seconds": 0.5
    }  # fmt: skip
    tracker.on_step(metrics(2, grad_norm=math.inf))
    tracker.close(failed=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["grad_norm"] is None


def test_metrics_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the metrics file .* cannot be written"):
        JsonlTracker(tmp_path / "file" / "metrics.jsonl")


def test_unknown_logger() -> None:
    with pytest.raises(ConfigError, match="among tensorboard, wandb; found 'mlflow'"):
        require_loggers(["mlflow"])


def test_logger_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.finetune.options.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        require_loggers(["wandb"])


class Recorder:
    """Stands for a SummaryWriter and for a wandb run, whose packages are optional: keeps the calls made to it."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[Any] = [options]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((values, step))

    def close(self) -> None:
        self.calls.append("closed")

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    made: list[Recorder] = []

    def make(**options: Any) -> Recorder:
        made.append(Recorder(**options))
        return made[-1]

    for module, function in (("torch.utils.tensorboard", "SummaryWriter"), ("wandb", "init")):
        stand_in = ModuleType(module)
        setattr(stand_in, function, make)
        monkeypatch.setitem(sys.modules, module, stand_in)
    return made


def test_all_trackers_are_opened_told_and_closed(tmp_path: Path, recorders: list[Recorder]) -> None:
    with ExitStack() as stack:
        trackers = open_trackers(
            metrics=tmp_path / "metrics.jsonl",
            loggers=["wandb", "tensorboard"],
            output=tmp_path,
            config={"lr": 1.0},
            stack=stack,
        )
        for tracker in trackers:
            tracker.on_step(metrics(3))
            tracker.on_evaluation(3, 2.0)
    tensorboard, wandb = recorders
    assert tensorboard.calls[0] == {"log_dir": str(tmp_path / "tensorboard")}
    assert ("train/loss", 1.5, 3) in tensorboard.calls
    assert tensorboard.calls[-2:] == [("evaluation/loss", 2.0, 3), "closed"]
    assert wandb.calls[0] == {"config": {"lr": 1.0}}
    assert wandb.calls[1][0]["train/tokens_per_s"] == 200.0
    assert wandb.calls[2:] == [({"evaluation/loss": 2.0}, 3), 0]


def test_failure_is_told_and_closes_what_was_open(tmp_path: Path, recorders: list[Recorder]) -> None:
    stack = ExitStack()
    open_trackers(metrics=None, loggers=["wandb"], output=tmp_path, config={}, stack=stack)
    with pytest.raises(KeyboardInterrupt), stack:
        raise KeyboardInterrupt
    assert recorders[0].calls[-1] == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_every_number(terminal: bool) -> None:
    out = StringIO()
    tracker = ProgressTracker(Console(file=out, force_terminal=terminal, width=200), steps=4, memory=lambda: 3 * 2**29)
    tracker.on_evaluation(0, 2.0)
    tracker.on_step(metrics(2))
    tracker.close(failed=False)
    for expected in (
        "evaluation loss, base model: 2.0000",
        "2/4",
        "loss 1.5000",
        "lr 1.00e-04",
        "200 tok/s",
        "1.50 GiB",
    ):
        assert expected in out.getvalue()
