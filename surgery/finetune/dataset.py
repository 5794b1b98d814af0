"""Samples and the plan of a job: all that can be refused before weights are read."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError, DataError
from surgery.finetune.batches import Schedule, steps_in
from surgery.finetune.encode import Sample, encode_records
from surgery.finetune.options import DataOptions, Job
from surgery.finetune.records import Record, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.checkpoint import Checkpoint

__all__ = ["Dataset", "Plan", "build_dataset", "load_tokenizer", "make_plan", "read_data", "split"]


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
    largest = max(max(sample.ids) for sample in kept)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {largest} for {path}, but the model has only {vocab_size} "
            "embeddings; use the tokenizer that belongs to the checkpoint"
        )
    return kept


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of a training run: samples, the size of a global batch, the learning rate of each step.

    `pad` is the token that fills batches; it is never learnt.
    """

    dataset: Dataset
    batch: int
    schedule: Schedule
    pad: int


def read_data(options: DataOptions) -> tuple[Sequence[Record], Sequence[Record] | None]:
    """Records to train on and, with a file for that, to evaluate on; raises `DataError` naming file and line."""
    evaluation = None if options.evaluation is None else read_records(options.evaluation)
    return read_records(options.train), evaluation


def make_plan(
    job: Job, train: Sequence[Record], evaluation: Sequence[Record] | None, checkpoint: Checkpoint, *, world: int
) -> Plan:
    """Tokenize with the checkpoint's tokenizer and lay out the steps.

    Raises `ConfigError` or `DataError`. Reads no weights.
    """
    tokenizer = load_tokenizer(checkpoint)
    dataset = build_dataset(
        train,
        tokenizer,
        max_length=job.data.max_length,
        seed=job.training.seed,
        vocab_size=_vocab_size(checkpoint.config),
        evaluation=evaluation,
        evaluation_fraction=job.data.evaluation_fraction,
    )
    options = job.training
    batch = options.batch_size * options.accumulation * world
    steps = steps_in(len(dataset.train), size=batch, epochs=options.epochs_to_run, max_steps=options.max_steps)
    schedule = Schedule(name=options.schedule, peak=options.lr, steps=steps, warmup_steps=options.warmup_steps)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Plan(dataset=dataset, batch=batch, schedule=schedule, pad=pad or 0)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; raises `ConfigError` if it has none, or one that is code of its own."""
    # Imported here: it takes seconds, and a script may bring samples of its own.
    from transformers import AutoTokenizer

    try:
        # Left unsaid, transformers asks at the terminal whether to run the checkpoint's own code.
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    # What a missing or broken tokenizer raises depends on its class: OSError, ValueError, ImportError ...
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the tokenizer of {checkpoint.path} is code that the checkpoint brings along, which is not run; use a "
                "checkpoint with a tokenizer that transformers has, or save this one as a tokenizer.json"
            ) from None
        raise ConfigError(
            f"{checkpoint.path} has no tokenizer that transformers can load ({type(error).__name__}: {error}); "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from error


def _vocab_size(config: dict[str, Any] | None) -> int | None:
    """Number of embeddings of the model; models of text and images keep it one level down."""
    config = config or {}
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None
