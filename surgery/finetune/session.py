"""A training run: steps, evaluations among them, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

from surgery.finetune.batches import GlobalBatch, global_batches, share
from surgery.finetune.loop import StepMetrics, Trainer
from surgery.finetune.options import TrainingOptions
from surgery.finetune.prepare import Plan
from surgery.finetune.trackers import Tracker

__all__ = ["Evaluation", "Session", "Training"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean token loss on the evaluation samples after so many steps; 0 is the base model."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run gave: the loss of each step, evaluations, and tokens and seconds of the steps."""

    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    tokens: int
    seconds: float


def _unwatched(_step: int) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Session:
    """One rank's run of a plan. Every rank has the same plan and evaluates at the same steps.

    watch: around every evaluation after so many steps; where there is none, around the first step of training.
    """

    plan: Plan
    options: TrainingOptions
    rank: int
    world: int
    trackers: Sequence[Tracker] = ()
    watch: Callable[[int], AbstractContextManager[object]] = _unwatched

    def run(self, trainer: Trainer) -> Training:
        """Train to the end; if there is a split, evaluate before, every so many steps, and after the last."""
        evaluations = [self._evaluate(trainer, 0)] if self._evaluates else []
        losses: list[float] = []
        tokens, seconds = 0, 0.0
        for metrics in self._steps(trainer):
            losses.append(metrics.loss)
            tokens += metrics.tokens
            seconds += metrics.seconds
            for tracker in self.trackers:
                tracker.on_step(metrics)
            if self._is_due(metrics.step):
                evaluations.append(self._evaluate(trainer, metrics.step))
        return Training(losses=tuple(losses), evaluations=tuple(evaluations), tokens=tokens, seconds=seconds)

    def _steps(self, trainer: Trainer) -> Iterator[StepMetrics]:
        steps = trainer.train(self._training_batches())
        if not self._evaluates:
            with self.watch(1):
                first = list(islice(steps, 1))
            yield from first
        yield from steps

    @property
    def _evaluates(self) -> bool:
        return bool(self.plan.dataset.evaluation)

    def _is_due(self, step: int) -> bool:
        every = self.options.evaluate_every
        is_last = step == self.plan.schedule.steps
        return self._evaluates and (is_last or (every is not None and step % every == 0))

    def _evaluate(self, trainer: Trainer, step: int) -> Evaluation:
        with self.watch(step):
            loss = trainer.evaluate(self._evaluation_batches())
        for tracker in self.trackers:
            tracker.on_evaluation(step, loss)
        return Evaluation(step=step, loss=loss)

    def _training_batches(self) -> Iterator[GlobalBatch]:
        samples = self.plan.dataset.train
        order = global_batches(
            len(samples),
            size=self.plan.batch,
            steps=self.plan.schedule.steps,
            epochs=self.options.epochs_to_run,
            seed=self.options.seed,
        )
        for indices in order:
            yield share(
                samples,
                indices,
                batch_size=self.options.batch_size,
                world=self.world,
                rank=self.rank,
                pad=self.plan.pad,
            )

    def _evaluation_batches(self) -> Iterator[GlobalBatch]:
        samples = self.plan.dataset.evaluation
        size = self.options.batch_size * self.world
        for start in range(0, len(samples), size):
            yield share(
                samples,
                range(start, min(start + size, len(samples))),
                batch_size=self.options.batch_size,
                world=self.world,
                rank=self.rank,
                pad=self.plan.pad,
            )
