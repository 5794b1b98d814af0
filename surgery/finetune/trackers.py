"""Trackers: where rank 0 sends the numbers of a run: a terminal, a JSONL file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgery.errors import ConfigError
from surgery.finetune.loop import StepMetrics, Tracker

__all__ = ["JsonlTracker", "ProgressTracker", "close_with", "open_trackers", "scalars"]


class JsonlTracker:
    """One JSON object a step, flushed at once, so that the file can be followed and survives a crash.

    Keys: step, loss, lr, grad_norm, tokens_per_s, tokens, seconds; null for a number that is not finite. Evaluations
    are in the summary. An existing file is replaced. Raises `ConfigError` if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the metrics file {path} cannot be written: {error.strerror or error}") from error

    def on_step(self, metrics: StepMetrics) -> None:
        """Write a line."""
        finite = {key: value if math.isfinite(value) else None for key, value in scalars(metrics).items()}
        self._file.write(json.dumps({"step": metrics.step, **finite}) + "\n")
        self._file.flush()

    def on_evaluation(self, step: int, loss: float) -> None:
        """Write nothing."""

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  # what was written stays, either way
        """Close the file."""
        self._file.close()


class _TensorBoard:
    """Scalars `train/*` and `evaluation/loss` in an event file under `directory`."""

    def __init__(self, directory: Path) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer: Any = module.SummaryWriter(log_dir=str(directory))

    def on_step(self, metrics: StepMetrics) -> None:
        for key, value in scalars(metrics).items():
            self._writer.add_scalar(f"train/{key}", value, metrics.step)

    def on_evaluation(self, step: int, loss: float) -> None:
        self._writer.add_scalar("evaluation/loss", loss, step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  # an event file has no place for it
        self._writer.close()


class _Wandb:
    """A Weights & Biases run with the same scalars; its project and mode come from its own environment."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._run: Any = importlib.import_module("wandb").init(config=dict(config))

    def on_step(self, metrics: StepMetrics) -> None:
        self._run.log({f"train/{key}": value for key, value in scalars(metrics).items()}, step=metrics.step)

    def on_evaluation(self, step: int, loss: float) -> None:
        self._run.log({"evaluation/loss": loss}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """The numbers of a step by name, the step itself left out."""
    names = ("loss", "lr", "grad_norm", "tokens_per_s", "tokens", "seconds")
    return {name: getattr(metrics, name) for name in names}


def open_trackers(
    *, metrics: Path | None, loggers: Sequence[str], output: Path, config: Mapping[str, Any], stack: ExitStack
) -> list[Tracker]:
    """The trackers asked for; `stack` closes each of them, also if a later one cannot be opened."""
    openers: list[Callable[[], Tracker]] = []
    if metrics is not None:
        openers.append(lambda: JsonlTracker(metrics))
    if "tensorboard" in loggers:
        openers.append(lambda: _TensorBoard(output / "tensorboard"))
    if "wandb" in loggers:
        openers.append(lambda: _Wandb(config))
    return [close_with(stack, opener()) for opener in openers]


def close_with(stack: ExitStack, tracker: Tracker) -> Tracker:
    """`tracker`, which is closed when `stack` is."""
    stack.push(lambda kind, _error, _trace: tracker.close(failed=kind is not None))
    return tracker


class ProgressTracker:
    """A tracker that shows loss, learning rate, tokens/s and memory of `steps` steps on `console`.

    `memory` gives the bytes in use, asked once a step.
    """

    def __init__(self, console: Console, *, steps: int, memory: Callable[[], int]) -> None:
        self._console = console
        self._steps = steps
        self._memory = memory
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, status="")

    def on_step(self, metrics: StepMetrics) -> None:
        """Move the bar, or print a line."""
        self._bar.start()  # not before there is a step: loading the model has a bar of its own
        status = (
            f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  {metrics.tokens_per_s:,.0f} tok/s  "
            f"{self._memory() / 2**30:.2f} GiB"
        )
        self._bar.update(self._task, completed=metrics.step, status=status)
        if not self._console.is_terminal:
            self._say(f"step {metrics.step}/{self._steps}  {status}")

    def on_evaluation(self, step: int, loss: float) -> None:
        """Print a line."""
        name = "base model" if step == 0 else f"after step {step}"
        self._say(f"evaluation loss, {name}: {loss:.4f}")

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  # what is shown stays, either way
        """Take the bar off the terminal."""
        self._bar.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
