"""Callbacks of the trainer: what rank 0 says on the way, attestation, and phases of a trace."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from surgery import attest, attesting, capture, compile_blocks
from surgery.attestation.differences import Attestation
from surgery.errors import SurgeryError
from surgery.step.graphs import tally
from surgery.telemetry.report import Report

__all__ = ["Attested", "Attesting", "Capturing", "Check", "Compiling", "Phases", "Progress", "TrainingError"]

#: Layers whose weights are compared in each watched forward, others each time; all are compared at rest.
SAMPLE = 8


class TrainingError(SurgeryError, ArithmeticError):
    """Training that cannot go on; `step` is counted from 1."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class Compiling(TrainerCallback):
    """Compiles the decoder blocks before the first step, when the model is sharded and its checkpoints are there."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Compile the blocks."""
        compile_blocks(model)


class Progress(TrainerCallback):
    """One line on `console` for each log and evaluation; on the other ranks, None, only a look at the loss.

    Raises `TrainingError` on every rank once a loss is not finite.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Say what was logged."""
        logs = logs or {}
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {state.global_step} is {loss}: lower --learning-rate; the newest checkpoint in "
                f"{args.output_dir} is from before",
                step=state.global_step,
            )
        if self._console is None:
            return
        if "loss" in logs:
            figures = " ".join(self._figures(logs))
            say(self._console, f"step {state.global_step}/{state.max_steps}  loss {loss:.4f}  {figures}")
        elif "eval_loss" in logs:
            say(self._console, f"after step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}")

    def _figures(self, logs: Mapping[str, Any]) -> Iterator[str]:
        """Figures that are worth a look beside the loss."""
        now = time.monotonic()
        yield f"lr {logs.get('learning_rate', 0):.2e}  gradient norm {float(logs.get('grad_norm', 0)):.3f}"
        if "rewards/accuracies" in logs:
            yield f" preferred {logs['rewards/accuracies']:.0%}"
        yield f" {now - self._since:.1f} s"
        self._since = now


class Phases(TrainerCallback):
    """Measures, in `report`, how long it takes to prepare and to train, and at what peak of memory."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._phase = ExitStack()

    def begin(self, name: str) -> None:
        """End the phase that runs, and begin another."""
        self.end()
        self._phase.enter_context(self._report.phase(name, group=name))

    def end(self) -> None:
        """End the phase that runs."""
        self._phase.close()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The model is filled and sharded by now."""
        self.begin("train")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """All steps are taken."""
        self.end()


class Capturing(TrainerCallback):
    """Captures the steps of `trainer` as CUDA graphs, and says on `console`, rank 0's, what became of them."""

    def __init__(self, trainer: Any, console: Console | None) -> None:
        self._trainer = trainer
        self._console = console

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The model is prepared by now, and wrapped as it will be called."""
        if not tally(self._trainer.model_wrapped):  # a smaller batch may be tried after one that was too large
            capture(self._trainer.model_wrapped)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """All steps are taken."""
        found = tally(self._trainer.model_wrapped)
        if found and self._console is not None:
            say(self._console, f"CUDA graphs: {found}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One attestation. when: `start`, `step N`, `end`. where: `at rest` or `in forward`, of so many layers."""

    when: str
    where: str
    layers: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Attested:
    """Attestations of a job; the digest is of all 4-bit layers as quantized, the same on any number of ranks."""

    digest: str
    checks: tuple[Check, ...]

    def text(self) -> str:
        """One line."""
        layers = max(check.layers for check in self.checks)
        forward = sum(check.where == "in forward" for check in self.checks)
        at_rest = ", ".join(check.when for check in self.checks if check.where == "at rest")
        return (
            f"Attestation: {layers} layers are what was quantized, at rest ({at_rest}) and in forward "
            f"({forward} times, samples); digest {self.digest}"
        )


class Attesting(TrainerCallback):
    """Attests the model at rest as training begins, and in forward in the first step and in that after an evaluation.

    Collective, as training is; raises `AttestationError` on every rank.
    """

    def __init__(self) -> None:
        self._digest = ""
        self._checks: list[Check] = []
        self._watch = ExitStack()
        self._is_due = True

    def result(self) -> Attested:
        """Attestations so far."""
        return Attested(digest=self._digest, checks=tuple(self._checks))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is filled by now."""
        self.at_rest("start", kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the step if it is due."""
        if self._is_due:
            self._seen = self._watch.enter_context(attesting(kwargs["model"], SAMPLE, seed=state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare what was seen."""
        if not self._is_due:
            return
        self._is_due = False
        self._watch.close()
        assert self._seen.attestation is not None
        self._note(f"step {state.global_step}", self._seen.attestation)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Watch the next step: upstream, evaluating packs weights again on some hosts."""
        self._is_due = True

    def at_rest(self, when: str, model: nn.Module) -> None:
        """Compare all shards and quant_states."""
        attestation = attest(model)
        self._digest = attestation.digest
        self._note(when, attestation)

    def _note(self, when: str, found: Attestation) -> None:
        check = Check(when=when, where=found.where, layers=len(found.layers), seconds=round(found.seconds, 4))
        self._checks.append(check)


def say(console: Console, text: str) -> None:
    """Print as it is: no markup in paths and names, no line breaks of our own."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
