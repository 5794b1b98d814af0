"""Training data through `datasets`: found, checked for a shape that TRL knows, divided, and digested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from surgery.comm.comparison import Facts
from surgery.errors import ConfigError, DataError
from surgery.finetune.options import Options

__all__ = ["Data", "check_tokens", "read_data"]

#: Suffixes of files -> what `datasets` calls their reader. A compressed file has another suffix behind.
READERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip

#: Columns of one of which TRL makes samples, for its SFTTrainer and its DPOTrainer.
SFT_SHAPES = (("messages",), ("prompt", "completion"), ("text",), ("input_ids",))
DPO_SHAPES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))

#: Columns of tokens that TRL makes of them.
_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")

#: Further columns that TRL reads.
_READ_TOO = {"tools", "labels", "completion_mask", "assistant_masks", "chat_template_kwargs", "image", "images"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples to train on, and to evaluate on; `shape` names the columns that they are made of."""

    train: Any
    evaluation: Any | None
    shape: tuple[str, ...]

    @property
    def unused(self) -> list[str]:
        """Columns that TRL does not read."""
        return [name for name in self.train.column_names or () if name not in {*self.shape, *_READ_TOO}]

    @property
    def is_one_turn(self) -> bool:
        """Whether every conversation has one assistant turn, its last; False where they are streamed."""
        wholes = [each for each in (self.train, self.evaluation) if each is not None]
        if not all(isinstance(each, datasets.Dataset) for each in wholes):
            return False
        return all(_ends_with_its_answer(row) for each in wholes for row in each["messages"])

    def as_completions(self) -> tuple[Any, Any]:
        """Both, with all turns but the last as the prompt."""
        train, evaluation = (
            each if each is None else each.map(_as_completion, remove_columns=["messages"])
            for each in (self.train, self.evaluation)
        )
        return train, evaluation

    def facts(self) -> Facts:
        """Facts that must be the same on all ranks."""
        return {"training data": _digest(self.train), "evaluation data": _digest(self.evaluation)}

    def counts(self) -> dict[str, int | None]:
        """Numbers of samples; None where they are streamed."""
        return {"train": _count(self.train), "evaluation": 0 if self.evaluation is None else _count(self.evaluation)}


def _ends_with_its_answer(messages: Sequence[Mapping[str, Any]]) -> bool:
    return [each["role"] == "assistant" for each in messages] == [False] * (len(messages) - 1) + [True]


def _as_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def read_data(options: Options, *, preferences: bool, seed: int, text: str = "text") -> Data:
    """The data that `options` name. text: what the column of running text is called.

    Raises `DataError` for what cannot be found or read, and for rows that make no sample.
    """
    shapes = (
        DPO_SHAPES
        if preferences
        else tuple(tuple(text if name == "text" else name for name in shape) for shape in SFT_SHAPES)
    )
    train = _read(options.data, streaming=options.streaming)
    shape = _shape(train, shapes, options.data)
    evaluation = _read(options.eval_data, streaming=False) if options.eval_data else None
    if evaluation is not None and _shape(evaluation, shapes, options.eval_data) != shape:
        raise DataError(
            f"expected --eval-data with {_named(shape)}, as --data has, found {_named(evaluation.column_names)}"
        )
    if options.eval_fraction is not None:
        train, evaluation = _divided(train, options.eval_fraction, seed)
    return Data(train=train, evaluation=evaluation, shape=shape)


def check_tokens(samples: Any, vocabulary: int, sources: Sequence[str]) -> None:
    """Raise `DataError` if `samples`, which TRL has made of `sources`, hold a token beyond the vocabulary of the model.

    A GPU would stop at it with a failed assertion. What is streamed is not looked at.
    """
    if not isinstance(samples, datasets.Dataset):
        return
    import pyarrow.compute as pc

    names = [name for name in _TOKENS if name in samples.column_names]
    for table in samples.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            largest = pc.max(pc.list_flatten(table[name])).as_py()
            if largest is not None and largest >= vocabulary:
                where = ", ".join(sources)
                raise DataError(
                    f"{where}: expected tokens below {vocabulary}, the vocabulary of the model, found {largest}: the "
                    "tokenizer is another model's, or has got tokens that the model has not",
                    path=where,
                )


def _divided(whole: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    count = round(len(whole) * fraction)
    if not 0 < count < len(whole):
        left = "none to train on" if count else "none to evaluate on"
        raise ConfigError(
            f"--eval-fraction {fraction} of {len(whole)} samples leaves {left}: use another, or more data"
        )
    parts = whole.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _read(sources: Sequence[str], *, streaming: bool) -> Any:
    configs = [_source(each) for each in sources]
    found = [_load([config], streaming=streaming) for config in configs]
    columns = [set(each.column_names or ()) for each in found]
    for config, names in zip(configs, columns, strict=True):
        if names != columns[0]:
            raise DataError(
                f"expected all of --data with the same columns, found {_named(columns[0])} in {_where(configs[0])} and "
                f'{_named(names)} in {_where(config)}; choose some with "columns", or rename them'
            )
    if len(configs) == 1 and configs[0].fraction is None:
        return found[0]
    return _load(configs, streaming=streaming)


def _load(configs: Sequence[DatasetConfig], *, streaming: bool) -> Any:
    names = ", ".join(map(_where, configs))
    try:
        return get_dataset(DatasetMixtureConfig(datasets=list(configs), streaming=streaming))["train"]
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        raise DataError(f"{names}: cannot be read: {' '.join(str(error).split())[:600]}", path=names) from error


def _source(text: str) -> DatasetConfig:
    if text.startswith("{"):
        try:
            config = DatasetConfig(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"expected a JSON object of TRL's DatasetConfig as --data, found {text:.200}: {error}"
            ) from error
    else:
        config = DatasetConfig(path=text)
    path = Path(config.path)
    if path.is_file():
        config.path, config.data_files = _reader(path), [str(path)]
    elif config.path in READERS.values() or path.is_dir():
        return config
    elif path.is_absolute() or config.path.startswith(".") or _suffix(path) in READERS:
        raise DataError(f"{path}: cannot be read: No such file or directory", path=path)
    return config


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix in READERS), path.suffix)


def _reader(path: Path) -> str:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise DataError(f"{path}: expected one of {', '.join(READERS)}, found {path.suffix or 'no suffix'}", path=path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: expected samples, found an empty file", path=path)
    return reader


def _where(config: DatasetConfig) -> str:
    return ", ".join(config.data_files) if isinstance(config.data_files, list) else str(config.path)


def _shape(data: Any, shapes: Sequence[tuple[str, ...]], sources: Sequence[str]) -> tuple[str, ...]:
    """The first of `shapes` whose columns are there. Raises `DataError` if none is, several are, or a value is null."""
    names = data.column_names or list(next(iter(data)))
    found = [shape for shape in shapes if set(shape) <= set(names)]
    expected = " or ".join(map(_named, shapes))
    where = ", ".join(sources)
    if not found:
        raise DataError(f"{where}: expected the columns {expected}, found {_named(names)}; rename yours", path=where)
    if len(found) > 1 and not set(found[1]) <= set(found[0]):
        raise DataError(
            f"{where}: expected the columns of one kind of sample, {expected}, found {_named(names)}: TRL reads "
            'one kind from all rows. Choose with {"path": ..., "columns": [...]}',
            path=where,
        )
    if isinstance(data, datasets.Dataset):
        for name in found[0]:
            missing = data.data.column(name).null_count
            if missing:
                raise DataError(
                    f"{where}: expected {name!r} in every row, found {missing} of {len(data)} without", path=where
                )
    return found[0]


def _named(names: Any) -> str:
    return "{" + ", ".join(f'"{name}"' for name in names) + "}"


def _count(data: Any) -> int | None:
    return len(data) if isinstance(data, datasets.Dataset) else None


def _digest(data: Any) -> str:
    """Digest of the values of all rows; of what is streamed, of the first one."""
    if data is None:
        return "none"
    hashed = hashlib.blake2b(digest_size=16)
    if not isinstance(data, datasets.Dataset):
        hashed.update(json.dumps(next(iter(data)), default=str, sort_keys=True).encode())
        return hashed.hexdigest()
    import pyarrow as pa

    for table in data.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            hashed.update(memoryview(batch.serialize()) if isinstance(batch, pa.RecordBatch) else b"")
    return hashed.hexdigest()
