"""Files saved beside the weights of an adapter: its configuration, the model card, and the tokenizer."""

from __future__ import annotations

import copy
import os
import platform
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.errors import ConfigError
from surgery.model.consistency import LIBRARIES, installed_version

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = [
    "TOKENIZER_FILES",
    "Base",
    "base_folder",
    "base_of",
    "config_to_save",
    "name_base",
    "read_tokenizer",
    "render_card",
    "tokenizer_sizes",
    "versions",
]


#: A folder of the hub's cache, and a commit, whole or abbreviated.
_SNAPSHOT = re.compile(r".*/models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model: a hub id, or a folder by its absolute path; and its revision, None where it is not known."""

    name: str | None
    revision: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """A folder by its absolute path; what is on the hub by its id, and the commit as `revision`."""
        return cls(
            name=checkpoint.source if checkpoint.revision else str(checkpoint.path), revision=checkpoint.revision
        )

    def __str__(self) -> str:
        return f"{self.name}{'' if self.revision is None else f' at {self.revision}'}"

    def is_named_like(self, other: Base) -> bool:
        """Whether both are one repository, or one folder."""
        mine, its = self._on_the_hub().name, other._on_the_hub().name
        return mine == its or (mine is not None and its is not None and os.path.realpath(mine) == os.path.realpath(its))

    def check_revision(self, given: Base, file: Path) -> None:
        """Raise `ConfigError` if `given` is the same repository at another commit than this, which `file` names."""
        mine, its = self._on_the_hub(), given._on_the_hub()
        if mine.revision is None or its.revision is None or not mine.is_named_like(its):
            return
        commit = mine._commit()
        if commit is not None and its.revision.startswith(commit):
            return
        known = ", and nothing here says which commit that is" if commit is None else f" (commit {commit})"
        known = "" if commit == mine.revision else known
        raise ConfigError(
            f"{file}: expected {mine.name} at revision {mine.revision}{known}, on which the adapter was trained, found "
            f"commit {its.revision}: open the model with revision={mine.revision!r} (--model-revision), or, if both "
            "have the same weights, change revision there"
        )

    def _on_the_hub(self) -> Base:
        """The id and the commit, for a folder of the hub's cache; else itself."""
        found = _SNAPSHOT.fullmatch(self.name or "")
        return self if found is None else Base(name=found["name"].replace("--", "/"), revision=found["commit"])

    def _commit(self) -> str | None:
        """The commit, maybe abbreviated, that `revision` is; None where the hub's cache does not know it."""
        if self.revision is None or _COMMIT.fullmatch(self.revision):
            return self.revision
        folder = _cached(self.name, self.revision)
        return None if folder is None else folder.name


_bases: weakref.WeakKeyDictionary[nn.Module, Base] = weakref.WeakKeyDictionary()


def name_base(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Remember `checkpoint` as the base of `model`, and name it in the configurations of its adapters, if it has any.

    A folder by its absolute path; what is on the hub by its id, and the commit as `revision`.
    """
    from peft import PeftModel

    base = _bases[model] = Base.of(checkpoint)
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        config.base_model_name_or_path, config.revision = base.name, base.revision or config.revision


def base_of(model: nn.Module) -> Base | None:
    """The base model of `model`, or of one in it: as it was remembered, or as transformers has it."""
    remembered = next((_bases[module] for module in model.modules() if module in _bases), None)
    if remembered is not None:
        return remembered
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    for config in configs:
        name = getattr(config, "_name_or_path", None)
        if isinstance(name, str) and name:
            return Base(
                name=str(Path(name).absolute()) if Path(name).is_dir() else name,
                revision=getattr(config, "_commit_hash", None),
            )
    return None


def base_folder(config: PeftConfig) -> Path | None:
    """The folder of the base model on this machine, hub cache included; None if it has none. Nothing is downloaded."""
    from huggingface_hub.errors import HFValidationError

    name = config.base_model_name_or_path
    if not name:
        return None
    try:
        return _cached(name, config.revision)
    except HFValidationError:  # no id, so it is a path
        return Path(name) if Path(name).is_dir() else None


def _cached(name: str | None, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name or "", "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def config_to_save(model: PeftModel, adapter: str) -> PeftConfig:
    """A copy of the configuration of `adapter`, for inference; with `CAUSAL_LM` where no task was given for one.

    Where it names no base model, it gets that of another adapter of `model`, as for one that was added later. Dropout,
    which changes nothing then, is none where parameters are adapted: PEFT would refuse to load it. Names are in order,
    so that the same configuration is the same file.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: Any = copy.deepcopy(model.peft_config[adapter])
    named = [each for each in model.peft_config.values() if each.base_model_name_or_path]
    if named and not config.base_model_name_or_path:
        config.base_model_name_or_path, config.revision = named[0].base_model_name_or_path, named[0].revision
    config.inference_mode = True
    if getattr(config, "target_parameters", None) and getattr(config, "lora_dropout", 0):
        config.lora_dropout = 0.0
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    # The class of the base model, without those that sharding puts in front of it.
    mro = type(model.get_base_model()).__mro__
    kind = next(each for each in mro if not each.__module__.startswith("torch.distributed."))
    if config.task_type is None and kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        config.task_type = "CAUSAL_LM"
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config  # type: ignore[no-any-return]


_DISTRIBUTIONS = (*LIBRARIES, "accelerate", "wrapt")

Section = Mapping[str, object]


def render_card(config: PeftConfig, sections: Mapping[str, Section]) -> str:
    """The text of README.md: metadata of the Hugging Face Hub, the base model, `sections` by title, and versions."""
    base, revision = config.base_model_name_or_path, config.revision
    header = {
        # The hub takes ids alone.
        "base_model": base if base and not Path(base).is_absolute() else None,
        "library_name": "peft",
        "pipeline_tag": "text-generation" if config.task_type == "CAUSAL_LM" else None,
        "tags": "[lora, qlora]",
    }
    adapter = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
    tables: dict[str, Section] = {
        "Base model": {"name": base, "revision": revision},
        "Adapter": {"type": str(config.peft_type).removeprefix("PeftType."), **adapter, "targets": _targets(config)},
        **sections,
        "Versions": versions(),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in header.items() if value is not None), "---", ""]
    lines.append("# Adapter trained on a 4-bit base model")
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines) + "\n"


def _targets(config: PeftConfig) -> object:
    """The targets as given, or their last names only: PEFT may list each module of each layer. Parameters are last."""
    targets = getattr(config, "target_modules", None)
    modules = [targets] if isinstance(targets, str) else sorted({each.rpartition(".")[2] for each in targets or ()})
    parameters = {".".join(each.split(".")[-2:]) for each in getattr(config, "target_parameters", None) or ()}
    return [*modules, *sorted(parameters)] or None


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that decide what a run does."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in _DISTRIBUTIONS}}


def _cell(value: object) -> str:
    """Text of a table cell: one line, without the character that ends a cell."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


TOKENIZER_FILES = (
    "added_tokens.json", "bpe.codes", "byte_maps.json", "chat_template.jinja", "chat_template.json", "dict.txt",
    "emoji.json", "merges.txt", "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model",
    "sentencepiece.model", "source.spm", "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model",
    "target.spm", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "vocab.txt", "word_pronunciation.json", "word_shape.json",
)  # fmt: skip


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The contents of the tokenizer's files by name; none, with a warning, if one cannot be read."""
    try:
        return {file.name: file.read_bytes() for file in _files(folder)}
    except OSError as error:  # no reason to lose what has been trained
        warnings.warn(f"The tokenizer in {folder} cannot be read, and is left out: {error}", stacklevel=2)
        return {}


def tokenizer_sizes(folder: Path) -> list[int]:
    """Bytes of each file of the tokenizer."""
    return [file.stat().st_size for file in _files(folder)]


def _files(folder: Path) -> Iterator[Path]:
    return (folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
