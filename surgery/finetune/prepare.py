"""Everything that can be refused before weights are read: the data, the tokenizer, the steps, the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError
from surgery.finetune.batches import steps_in
from surgery.finetune.dataset import Dataset, build_dataset
from surgery.finetune.options import DataOptions, Job
from surgery.finetune.records import Record, read_records
from surgery.finetune.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.checkpoint import Checkpoint

__all__ = ["Plan", "Records", "load_tokenizer", "make_plan", "read_data"]


@dataclass(frozen=True, kw_only=True)
class Records:
    """The records of the data files, checked but not tokenized."""

    train: Sequence[Record]
    evaluation: Sequence[Record] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will train on: samples, the size of a global batch, the learning rate of each step.

    `pad` is the token that fills batches; it is never learnt.
    """

    dataset: Dataset
    batch: int
    schedule: Schedule
    pad: int


def read_data(options: DataOptions) -> Records:
    """The records of the files; raises `DataError` naming file and line."""
    evaluation = None if options.evaluation is None else read_records(options.evaluation)
    return Records(train=read_records(options.train), evaluation=evaluation)


def make_plan(job: Job, records: Records, checkpoint: Checkpoint, *, world: int) -> Plan:
    """Tokenize with the checkpoint's tokenizer and lay out the steps; makes the output folder.

    Raises `ConfigError` or `DataError`. Reads no weights.
    """
    tokenizer = load_tokenizer(checkpoint)
    dataset = build_dataset(
        records.train,
        tokenizer,
        max_length=job.data.max_length,
        seed=job.training.seed,
        vocab_size=_vocab_size(checkpoint.config),
        evaluation=records.evaluation,
        evaluation_fraction=job.data.evaluation_fraction,
    )
    options = job.training
    batch = options.batch_size * options.accumulation * world
    steps = steps_in(len(dataset.train), size=batch, epochs=options.epochs_to_run, max_steps=options.max_steps)
    schedule = Schedule(name=options.schedule, peak=options.lr, steps=steps, warmup_steps=options.warmup_steps)
    _make_folder(job.output)
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
    """How many embeddings the model has; models of text and images keep it one level down."""
    config = config or {}
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the output folder {path} cannot be made: {error.strerror or error}") from error
