"""The training loop: steps over what `surgery.qlora` returns, evaluations among them, and who is told."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from surgery.errors import ConfigError, SurgeryError
from surgery.finetune.arguments import OptimizerName
from surgery.finetune.batches import IGNORED, GlobalBatch, MicroBatch, Schedule, global_batches, share
from surgery.finetune.dataset import Plan
from surgery.finetune.encode import Sample
from surgery.finetune.options import TrainingOptions
from surgery.sharding.base import ShardStrategy

__all__ = [
    "Evaluation",
    "Session",
    "StepMetrics",
    "Tracker",
    "Trainer",
    "TrainingError",
    "TrainingResult",
    "build_optimizer",
    "gradient_scale",
    "token_loss",
]


class TrainingError(SurgeryError, ArithmeticError):
    """Training that cannot go on; `step` is counted from 1."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step over the global batch; `step` is counted from 1.

    `loss` is the mean over the tokens that count, before the step; `tokens` the tokens of the global batch
    without padding; `grad_norm` the norm before clipping, not finite where loss scaling skipped the step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the global batch in a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model and what changes it.

    `model(input_ids=, attention_mask=, use_cache=)` returns an object with `.logits`. `optimizer` holds the trainable
    parameters after sharding. `autocast` is the dtype of the autocast around forward. `max_norm` None does not clip.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    strategy: ShardStrategy
    schedule: Schedule
    scaler: torch.amp.GradScaler
    device: torch.device
    autocast: torch.dtype | None = None
    max_norm: float | None = None

    def train(self, batches: Iterable[GlobalBatch]) -> Iterator[StepMetrics]:
        """Take one step for each batch, and yield its metrics after it.

        Raises `TrainingError` on every rank if the loss is not finite; the weights are then as before that step.
        """
        self.model.train()
        with _collecting_between_steps() as collect:
            for step, batch in enumerate(batches):
                yield self._step(step, batch)
                collect(step + 1)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[GlobalBatch]) -> float:
        """The mean loss over the tokens of all batches; the model is left in the mode in which it was."""
        total, targets = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with _evaluating(self.model):
            for batch in batches:
                targets += batch.targets
                for micro in batch.micro_batches:
                    total += self._loss(micro)
        return self.strategy.sum(total).item() / targets

    def _step(self, step: int, batch: GlobalBatch) -> StepMetrics:
        start = time.perf_counter()
        lr = self.schedule.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._accumulate(batch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step + 1} is {loss}; lower the learning rate, or "
                "choose another precision than fp16 if that is what you use",
                step=step + 1,
            )
        self.scaler.unscale_(self.optimizer)
        norm = self.strategy.clip(self.model, self.max_norm).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        return StepMetrics(step=step + 1, loss=loss, lr=lr, grad_norm=norm, tokens=batch.tokens, seconds=seconds)

    def _accumulate(self, batch: GlobalBatch) -> float:
        """Gradients of the mean loss over the global batch, and that loss."""
        scale = gradient_scale(targets=batch.targets, averaged_over=self.strategy.averaged_over)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(batch.micro_batches) - 1
        for index, micro in enumerate(batch.micro_batches):
            with self.strategy.micro_step(self.model, is_last=index == last):
                loss = self._loss(micro)
                torch.autograd.backward(self.scaler.scale(loss * scale))
            total += loss.detach()
        return self.strategy.sum(total).item() / batch.targets

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        micro = micro.to(self.device)
        with self._autocast():
            logits = self.model(input_ids=micro.ids, attention_mask=micro.mask, use_cache=False).logits
        return token_loss(logits, micro.targets)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy over the tokens that count, a float32 scalar; 0, with zero gradients, if none.

    `logits` is `(batch, length, vocabulary)` in any floating dtype, `targets` is `(batch, length)` int64,
    already shifted (`targets[i, t]` is what position `t` predicts), `IGNORED` where nothing is learnt.
    """
    # float32 before the softmax: over a vocabulary of 100,000 a bfloat16 sum has lost its small terms.
    # autocast would do the same for cross_entropy, but not for a model that computes in bfloat16 without it.
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradient_scale(*, targets: int, averaged_over: int) -> float:
    """The factor of a rank's summed loss that makes gradients those of the mean over the batch.

    `targets` is the number of tokens that count in the whole global batch; `averaged_over` is the number of
    ranks over which gradients are averaged (not summed) when they are exchanged, 1 where they are not.
    """
    return averaged_over / targets


#: Optimizer steps between two looks.
STEPS_BETWEEN = 50


@contextmanager
def _collecting_between_steps() -> Iterator[Callable[[int], None]]:
    """A block in which garbage is collected only by the function that it gives, on steps that are due.

    Left to itself, Python looks whenever enough objects were made, in the middle of a step, on each rank in another
    one, and all others wait for that rank in their next collective.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()

    def collect(step: int) -> None:
        if step % STEPS_BETWEEN == 0:
            gc.collect(1)

    try:
        yield collect
    finally:
        if was_enabled:
            gc.enable()


class Tracker(Protocol):
    """Receives every step and every evaluation, in order, and is closed at the end."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step has been taken."""

    def on_evaluation(self, step: int, loss: float) -> None:
        """The evaluation loss after `step` steps is known; 0 is before training."""

    def close(self, *, failed: bool) -> None:
        """No more will come; `failed` if training did not get to its end."""


def build_optimizer(
    model: nn.Module, name: OptimizerName, *, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`, as they are after sharding.

    AdamW takes one kernel for all of them on a GPU. Raises `ConfigError` if nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("expected trainable parameters (adapters), found none: every parameter is frozen")
    if name == "adamw":
        on_gpu = all(parameter.is_cuda for parameter in trainable)
        return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay, fused=on_gpu)
    return torch.optim.SGD(trainable, lr=lr, weight_decay=weight_decay)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean token loss on the evaluation samples after so many steps; 0 is the base model."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Results of a run: the loss of each step, evaluations, and tokens and seconds of the steps."""

    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Session:
    """One rank's run of a plan. Every rank has the same plan and evaluates at the same steps.

    watch: around every evaluation after so many steps; where there is none, around the first step of training.
    """

    trainer: Trainer
    plan: Plan
    options: TrainingOptions
    rank: int
    world: int
    trackers: Sequence[Tracker]
    watch: Callable[[int], AbstractContextManager[object]]

    def run(self) -> TrainingResult:
        """Train to the end; if there is a split, evaluate before, every so many steps, and after the last."""
        evaluations = [self._evaluate(0)] if self._evaluates else []
        losses: list[float] = []
        tokens, seconds = 0, 0.0
        for metrics in self._steps():
            losses.append(metrics.loss)
            tokens += metrics.tokens
            seconds += metrics.seconds
            for tracker in self.trackers:
                tracker.on_step(metrics)
            if self._is_due(metrics.step):
                evaluations.append(self._evaluate(metrics.step))
        return TrainingResult(losses=tuple(losses), evaluations=tuple(evaluations), tokens=tokens, seconds=seconds)

    def _steps(self) -> Iterator[StepMetrics]:
        samples, count = self.plan.dataset.train, self.plan.schedule.steps
        epochs, seed = self.options.epochs_to_run, self.options.seed
        order = global_batches(len(samples), size=self.plan.batch, steps=count, epochs=epochs, seed=seed)
        steps = self.trainer.train(self._batches(samples, order))
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

    def _evaluate(self, step: int) -> Evaluation:
        samples, size = self.plan.dataset.evaluation, self.options.batch_size * self.world
        order = (range(start, min(start + size, len(samples))) for start in range(0, len(samples), size))
        with self.watch(step):
            loss = self.trainer.evaluate(self._batches(samples, order))
        for tracker in self.trackers:
            tracker.on_evaluation(step, loss)
        return Evaluation(step=step, loss=loss)

    def _batches(self, samples: Sequence[Sample], order: Iterable[Sequence[int]]) -> Iterator[GlobalBatch]:
        size, pad = self.options.batch_size, self.plan.pad
        for indices in order:
            yield share(samples, indices, batch_size=size, world=self.world, rank=self.rank, pad=pad)
