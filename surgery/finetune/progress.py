"""What a person sees while it trains: a bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgery.finetune.loop import StepMetrics

__all__ = ["ProgressTracker"]


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
