"""An adapter in PEFT's format, on disk or on the hub: opened, checked against a model, and read in parts."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from surgery.adapters.attach import RANDOM
from surgery.adapters.folder import CONFIG, WEIGHTS
from surgery.adapters.metadata import Base
from surgery.adapters.options import check_adapter
from surgery.checkpoint import Index, Reader
from surgery.checkpoint.header import parse_json, read_header
from surgery.checkpoint.hub import Resolved, can_be_hub_id, exists, resolve
from surgery.checkpoint.layout import Layout
from surgery.errors import CheckpointError, ConfigError, WeightsMismatchError

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["SavedAdapter", "check_options"]

logger = logging.getLogger("surgery")

#: Files of PEFT, and of older releases, that only unpickling reads.
_PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")

#: Values of `init_lora_weights` that leave the base weights as they are; the others belong to weights that are changed.
_INITIALIZATIONS = (*RANDOM, "orthogonal", "eva")

#: Names that an error lists at most.
_SHOWN = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedAdapter:
    """A LoRA adapter that was saved; see `open`.

    source: as the user gave it. path: its folder. config: as `surgery.qlora(lora=...)` takes it, to train on, without
    the name of a base model. base: the model that it was trained on, as far as its files say. index: its tensors, by
    PEFT's keys. revision: the commit, for a hub id.
    """

    source: str
    path: Path
    config: LoraConfig
    base: Base
    index: Index = field(repr=False)
    revision: str | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Open a folder, or a hub id (see `surgery.checkpoint.hub.resolve`); no value is read.

        Raises `ConfigError` for what is no LoRA adapter in safetensors, or one that cannot be loaded in any sharding,
        and `CheckpointError` for a file that is truncated or malformed.
        """
        resolved = _resolved(source, revision)
        folder = resolved.path
        found = _read_config(folder)
        weights = _weights(folder)
        config = _lora(found, folder / CONFIG)
        index = Index.join(Layout(files=(weights,)), {weights: read_header(weights)})
        for entry in index.values():
            if entry.unknown or not entry.dtype.is_floating_point:
                raise CheckpointError(
                    f"{weights}: expected numbers of floating point in {entry.name}, found "
                    f"{entry.unknown or entry.dtype}; save the adapter again",
                    path=weights,
                    tensor=entry.name,
                )
        base = Base(name=config.base_model_name_or_path or None, revision=config.revision or None)
        config.base_model_name_or_path = config.revision = None  # PEFT warns where it names what is given another name
        return cls(
            source=os.fspath(source), path=folder, config=config, base=base, index=index, revision=resolved.revision
        )

    def fresh_config(self, *, trainable: bool) -> LoraConfig:
        """A copy of the configuration, for a model to have."""
        config = copy.deepcopy(self.config)
        config.inference_mode = not trainable
        return config

    def check_base(self, base: Base | None) -> None:
        """Raise `ConfigError` if `base` is another revision of the model that the adapter names; say if it is another.

        Names are no proof: the same model may be in any folder. So another name is a line of the log.
        """
        if base is None or base.name is None or self.base.name is None:
            return
        self.base.check_revision(base, self.path / CONFIG)
        if not self.base.is_named_like(base) and os.environ.get("RANK", "0") == "0":
            logger.warning("surgery: the adapter in %s was trained on %s, not on %s", self.path, self.base, base)

    def check_tensors(
        self, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Raise `WeightsMismatchError` unless the file has the tensors `expected`, key -> shape, and no others.

        found: what is made of the file, if it is not taken as it is.
        """
        found = {key: entry.shape for key, entry in self.index.items()} if found is None else found
        missing = sorted(expected.keys() - found.keys())
        unexpected = sorted(found.keys() - expected.keys())
        if missing or unexpected:
            lines = [f"{self.path / WEIGHTS} does not fit this model and {CONFIG}"]
            lines += [f"expected {len(missing)} tensors more: {_some(missing)}"] if missing else []
            lines += [f"found {len(unexpected)} that belong nowhere: {_some(unexpected)}"] if unexpected else []
            raise WeightsMismatchError(
                f"{'; '.join(lines)}. {_advice(unexpected)}",
                missing=missing,
                unexpected=unexpected,
                path=self.path / WEIGHTS,
            )
        other = [key for key, shape in expected.items() if tuple(shape) != tuple(found[key])]
        if other:
            key = min(other)
            raise WeightsMismatchError(
                f"{self.path / WEIGHTS} does not fit this model and {CONFIG}: expected {key} of shape "
                f"{tuple(expected[key])}, found {tuple(found[key])} ({len(other)} of {len(expected)} tensors "
                "differ). Give the model that it was trained on, and the configuration that was saved with it",
                path=self.path / WEIGHTS,
                tensor=key,
            )

    @contextmanager
    def reading(self) -> Iterator[_Values]:
        """A block in which values are read; at its end the file must be what it was when it was opened."""
        with Reader(self.index) as reader:
            yield _Values(reader)
            reader.check_unchanged()


@dataclass(frozen=True)
class _Values:
    """Values of an open file."""

    reader: Reader

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements `start` to `stop` of the flat tensor `key`, on the CPU; `CheckpointError` if not finite."""
        values = self.reader.read_range(key, start, stop)
        if not values.isfinite().all():
            raise CheckpointError(f"expected finite numbers in {key} of the adapter, found NaN or infinity", tensor=key)
        return values


def _resolved(source: str | os.PathLike[str], revision: str | None) -> Resolved:
    name = os.fspath(source)
    if not name or not (exists(Path(name)) or can_be_hub_id(name)):
        raise ConfigError(f"expected the folder of an adapter, or a hub id, found nothing at {name!r}")
    found = resolve(source, revision=revision)
    if not found.path.is_dir():
        raise ConfigError(f"expected the folder of an adapter, with {CONFIG} and {WEIGHTS}, found a file: {found.path}")
    return found


def _weights(folder: Path) -> Path:
    file = folder / WEIGHTS
    if file.is_file():
        return file
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        raise ConfigError(
            f"expected {WEIGHTS} in {folder}, found {pickles[0]}, a pickle, which could run any code: where you trust "
            "it, load it with PEFT and save it again by save_pretrained"
        )
    raise ConfigError(f"expected the folder of an adapter, found no {WEIGHTS} in {folder}")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        model = ", but a whole model's config.json" if (folder / "config.json").is_file() else ""
        raise ConfigError(f"expected the folder of an adapter, found no {CONFIG} in {folder}{model}")
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def check_options(found: Mapping[str, Any], file: Path) -> None:
    """Raise `ConfigError` for options in `file` that PEFT would leave out, and for names of a base that are no text."""
    from peft import LoraConfig

    known = {each.name for each in fields(LoraConfig) if each.init}
    options = sorted(name for name, value in found.items() if name not in known and value)
    if options:
        raise ConfigError(
            f"{file}: expected options of LoraConfig, found {_some(options)}, which the installed PEFT does not know "
            "and would leave out: install the release that has saved it (peft_version "
            f"{found.get('peft_version', 'is not given')})"
        )
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(found.get(name), (str, type(None))):
            raise ConfigError(f"{file}: expected a text, or null, in {name}, found {found[name]!r:.80}")


def _lora(found: Mapping[str, Any], file: Path) -> LoraConfig:
    """The configuration in `file`, for training on from it. Raises `ConfigError` where it cannot be."""
    from peft import LoraConfig

    if found.get("peft_type") != "LORA":
        raise ConfigError(
            f"{file}: expected peft_type LORA, found {found.get('peft_type')!r:.80}: other methods of PEFT are "
            "neither sharded nor merged here; load it with PEFT into a model in one process"
        )
    check_options(found, file)
    known = {each.name for each in fields(LoraConfig) if each.init}
    try:
        config = LoraConfig(**{name: value for name, value in found.items() if name in known})
        config.inference_mode = False
        _forget_initialization(config)
        check_adapter(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except Exception as error:  # values of any type are in a file, and fail in many ways
        raise ConfigError(f"{file} is not what LoraConfig takes: {type(error).__name__}: {error}") from error
    return config


def _forget_initialization(config: LoraConfig) -> None:
    """Make nothing of how values were drawn, since they are read."""
    init: Any = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in _INITIALIZATIONS:
        raise ConfigError(
            f"init_lora_weights={init!r}: such an adapter belongs to base weights that PEFT changed when it was made, "
            "and not to those of the checkpoint. Convert it to plain LoRA first: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) of PEFT"
        )
    config.init_lora_weights, config.loftq_config = True, {}
    config.corda_config = config.eva_config = config.lora_ga_config = None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _advice(unexpected: Sequence[str]) -> str:
    """Advice on keys that belong nowhere."""
    if any(re.search(r"\.experts\.\d+\.", key) for key in unexpected):
        return (
            "Its experts are one by one, as servers and transformers 4 have them: give the adapter that it was made "
            "of, or merge it into the base (surgery merge)"
        )
    if any(re.search(r"(embed\w*|lm_head|wte)\.(base_layer\.)?weight$", key) for key in unexpected):
        return (
            "Embeddings of the base model are in the file too, which stay here as the checkpoint has them: load it "
            "with PEFT, and save it by save_pretrained(..., save_embedding_layers=False)"
        )
    return (
        "Give the model that it was trained on, and the configuration that was saved with it; where an older release "
        "of transformers called modules otherwise, load it with PEFT and save it again"
    )
