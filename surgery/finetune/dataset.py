"""Training and evaluation samples, all of them in memory and checked before any weight is read."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import ConfigError, DataError
from surgery.finetune.encode import Sample, encode_records
from surgery.finetune.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Dataset", "build_dataset", "split"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples to train on and to evaluate on (none if no evaluation was asked for).

    `cut` counts the samples that were longer than the maximum length; `dropped` those left out because nothing to
    learn remained of them.
    """

    train: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]
    cut: int = 0
    dropped: int

    def digest(self) -> str:
        """A hash of every token and mask in order, by which ranks see that they were given the same data."""
        sha = hashlib.sha256()
        for part in (self.train, self.evaluation):
            for sample in part:
                sha.update(len(sample.ids).to_bytes(8, "little") + sample.ids.tobytes() + sample.learnt.tobytes())
            sha.update(b"end of part")
        return sha.hexdigest()


def build_dataset(
    train: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    vocab_size: int | None = None,
    evaluation: Sequence[Record] | None = None,
    evaluation_fraction: float | None = None,
) -> Dataset:
    """Encode and check records; evaluate on those of another file, or on a fraction of the same.

    `vocab_size` is the number of embeddings of the model, if it is known. Raises `DataError` for data that
    cannot be used and `ConfigError` for a tokenizer that does not fit the data or the model.
    """
    samples = list(encode_records(train, tokenizer, max_length=max_length))
    also = [] if evaluation is None else list(encode_records(evaluation, tokenizer, max_length=max_length))
    usable = _usable(samples, train[0].at.path, max_length, vocab_size)
    held_out: tuple[Sample, ...] = ()
    if evaluation is not None:
        held_out = _usable(also, evaluation[0].at.path, max_length, vocab_size)
    elif evaluation_fraction is not None:
        usable, held_out = split(usable, fraction=evaluation_fraction, seed=seed)
    everything = [*samples, *also]
    return Dataset(
        train=usable,
        evaluation=held_out,
        cut=sum(sample.cut > 0 for sample in everything),
        dropped=len(everything) - len(usable) - len(held_out),
    )


def split(samples: Sequence[Sample], *, fraction: float, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Samples to train on and samples held out, each in file order.

    Which ones depends on their number and the seed. At least one sample is held out; raises `DataError` if
    that leaves none to train on.
    """
    held_out = max(1, round(len(samples) * fraction))
    if held_out >= len(samples):
        raise DataError(
            f"holding out {fraction:g} of {len(samples)} usable samples for evaluation leaves none to train "
            "on; give more data, or an evaluation file of its own"
        )
    generator = random.Random(f"evaluation split {seed}")  # noqa: S311  # a choice, not a secret
    chosen = set(generator.sample(range(len(samples)), held_out))
    train = tuple(sample for index, sample in enumerate(samples) if index not in chosen)
    return train, tuple(samples[index] for index in sorted(chosen))


def _usable(samples: Sequence[Sample], path: Path, max_length: int, vocab_size: int | None) -> tuple[Sample, ...]:
    """The samples of a file with something to learn."""
    kept = tuple(sample for sample in samples if sample.targets > 0)
    if not kept:
        raise DataError(
            f"{path}: none of the {len(samples)} samples has a token to learn within the first {max_length} "
            "tokens; raise the maximum length, or shorten the prompts",
            path=path,
        )
    _check_vocabulary(kept, vocab_size, path)
    return kept


def _check_vocabulary(samples: Sequence[Sample], vocab_size: int | None, path: Path) -> None:
    largest = max(max(sample.ids) for sample in samples)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {largest} for {path}, but the model has only {vocab_size} "
            "embeddings; use the tokenizer that belongs to the checkpoint"
        )
