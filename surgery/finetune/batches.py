"""The order of samples, the share of each rank, and the learning rate of each step.

A global batch is one optimizer step on all ranks: batch size times accumulation times world size samples. Its content
depends on the seed and its size alone, so that any layout of ranks with the same global batch trains on the same
samples in the same steps. Every rank knows the whole plan; nothing has to be exchanged.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import get_args

import torch

from surgery.errors import ConfigError
from surgery.finetune.arguments import ScheduleName
from surgery.finetune.encode import Sample

__all__ = [
    "IGNORED",
    "GlobalBatch",
    "MicroBatch",
    "Schedule",
    "collate",
    "global_batches",
    "idle",
    "micro_batches",
    "share",
    "steps_in",
]

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples that go through the model at once.

    All are `(batch, length)` int64. `targets[i, t]` is the token that position `t` predicts, the one after it, or
    `IGNORED`. `mask` is 0 at padding, or None where there is none: attention kernels then take their fast path.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        ids, targets = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.targets))
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return MicroBatch(ids=ids, targets=targets, mask=mask)


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """One rank's share of a global batch, with the counts of the whole of it, over all ranks.

    `targets` is how many tokens count in the loss, `tokens` how many tokens there are, padding apart.
    """

    micro_batches: tuple[MicroBatch, ...]
    targets: int
    tokens: int


def steps_in(samples: int, *, size: int, epochs: int | None, max_steps: int | None) -> int:
    """Number of global batches of `size` in so many epochs, but at most `max_steps`.

    One of the two limits is given. With `max_steps` alone, epochs follow each other for as long as it takes.
    """
    if epochs is None and max_steps is None:
        raise ValueError("expected epochs, max_steps or both, found neither")
    if epochs is None:
        return max_steps or 0
    steps = -(-epochs * samples // size)
    return steps if max_steps is None else min(steps, max_steps)


def global_batches(samples: int, *, size: int, steps: int, epochs: int | None, seed: int) -> Iterator[list[int]]:
    """Indices of the samples of each step: every epoch a new permutation, one epoch running into the next.

    Only the last batch of the last epoch can be smaller than `size`.
    """
    stream = _stream(samples, epochs, seed)
    for _ in range(steps):
        yield list(islice(stream, size))


def _stream(samples: int, epochs: int | None, seed: int) -> Iterator[int]:
    epoch = 0
    while epochs is None or epoch < epochs:
        order = list(range(samples))
        # Not torch.randperm, whose sequence may change between releases of torch.
        random.Random(f"epoch {epoch} of seed {seed}").shuffle(order)  # noqa: S311  # an order, not a secret
        yield from order
        epoch += 1


def micro_batches(indices: Sequence[int], *, batch_size: int, world: int, rank: int) -> list[list[int]]:
    """One rank's micro-batches of a global batch; every rank has equally many, some of them maybe empty.

    Micro-batch `a` of rank `r` holds the samples at `(a * world + r) * batch_size` and the next ones.
    """
    rounds = -(-len(indices) // (batch_size * world))
    starts = [(round_ * world + rank) * batch_size for round_ in range(rounds)]
    return [list(indices[start : start + batch_size]) for start in starts]


def share(
    samples: Sequence[Sample], indices: Sequence[int], *, batch_size: int, world: int, rank: int, pad: int
) -> GlobalBatch:
    """One rank's share of a global batch of `samples[indices]`, padded with the token `pad`."""
    mine = micro_batches(indices, batch_size=batch_size, world=world, rank=rank)
    return GlobalBatch(
        # A rank without samples still runs the model, or the others would wait for it in a collective.
        micro_batches=tuple(
            collate([samples[index] for index in micro], pad=pad) if micro else idle(samples[indices[0]])
            for micro in mine
        ),
        targets=sum(samples[index].targets for index in indices),
        tokens=sum(len(samples[index].ids) for index in indices),
    )


def collate(samples: Sequence[Sample], *, pad: int) -> MicroBatch:
    """Samples side by side, padded on the right to the longest of them."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), pad, dtype=torch.int64)
    targets = torch.full((len(samples), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(samples), length), dtype=torch.int64)
    for row, sample in enumerate(samples):
        count = len(sample.ids)
        tokens = torch.tensor(sample.ids, dtype=torch.int64)
        learnt = torch.tensor(sample.learnt, dtype=torch.bool)
        ids[row, :count] = tokens
        targets[row, : count - 1] = tokens[1:].masked_fill(~learnt[1:], IGNORED)
        mask[row, :count] = 1
    return MicroBatch(ids=ids, targets=targets, mask=None if bool(mask.all()) else mask)


def idle(sample: Sample) -> MicroBatch:
    """The first two tokens of a sample, none of which is learnt."""
    ids = torch.tensor(sample.ids[:2], dtype=torch.int64).unsqueeze(0)
    return MicroBatch(ids=ids, targets=torch.full_like(ids, IGNORED), mask=None)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warmup to `peak`, then cosine or linear decay to 0, or no decay.

    Step 0 learns at `peak / warmup_steps`, the last step of the warmup at `peak`; 0 would be reached one step after the
    last: no step is wasted at rate 0. Raises `ConfigError` for values out of range.
    """

    name: ScheduleName
    peak: float
    steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ConfigError(f"expected the schedule to be cosine, linear or constant, found {self.name!r}")
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ConfigError(f"expected a learning rate above 0, found {self.peak}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(
                f"expected between 0 and {self.steps} warmup steps (there are {self.steps} steps in all), "
                f"found {self.warmup_steps}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        remaining = 1 - progress if self.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.peak * remaining
