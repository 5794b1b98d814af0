"""The command line and YAML of `surgery finetune` and `surgery dpo`, and their help: our options, then TRL's."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from trl import DPOConfig, ModelConfig, SFTConfig, TrlParser

from surgery.errors import ConfigError
from surgery.finetune.options import DEFAULTS, DPO_DEFAULTS, Options

__all__ = ["Request", "parse", "show_help"]

#: TRL's options that ours replace, or that this command decides.
_OURS = frozenset({"fsdp", "parallelism_config", "model_name_or_path", "trust_remote_code", "deepspeed"})

#: Columns of the help: what the names take, and the most of a line.
_NAMES, _WIDEST = 34, 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job as it was asked for. values: every option by its name, equal on all ranks of one job."""

    kind: type[SFTConfig | DPOConfig]
    model: ModelConfig
    options: Options
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The model: a folder, or a hub id."""
        return str(self.values["model_name_or_path"])

    @property
    def preferences(self) -> bool:
        """Whether this is DPO."""
        return issubclass(self.kind, DPOConfig)

    @property
    def output(self) -> Path:
        """The folder for the adapter and the checkpoints."""
        return Path(self.values["output_dir"])

    def training(self, **decided: Any) -> Any:
        """TRL's configuration, with what was `decided` in place of what was asked for.

        Joins the process group that the launcher describes. Raises `ConfigError` for values that TRL refuses.
        """
        return _build(self.kind, {**self.values, **decided})


def parse(arguments: Sequence[str], *, preferences: bool = False) -> Request:
    """The job that a command line asks for, its `--config` included. preferences: for DPO.

    Raises `ConfigError` for what neither TRL nor this project knows.
    """
    parser = _parser(preferences=preferences)
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model_name_or_path")
    config = _take_config(words)
    values = vars(parser.parse_args([*parser.words_of(config), *words]))
    if not values["model_name_or_path"]:
        raise ConfigError(
            "expected MODEL first, or `model_name_or_path:` in --config: a folder with a safetensors checkpoint, or a "
            "hub id; found none"
        )
    steps, epochs = values["max_steps"], values["num_train_epochs"]
    if steps == 0 or (steps < 0 and epochs <= 0):
        raise ConfigError(
            f"expected a step to train, found --max-steps {steps} and --num-train-epochs {epochs:g}; the former counts "
            f"where it is above 0"
        )
    if values["load_in_4bit"] is None:
        values["load_in_4bit"] = not values["load_in_8bit"]
    if values["bnb_4bit_quant_storage"] is None:
        # What FSDP can flatten together with the rest, and casts to nothing else.
        values["bnb_4bit_quant_storage"] = values["dtype"] if values["dtype"] != "auto" else "bfloat16"
    if values["adapter"] is not None:
        _refuse_lora(values, DPO_DEFAULTS if preferences else DEFAULTS)
    return Request(
        kind=DPOConfig if preferences else SFTConfig,
        model=_build(ModelConfig, values),
        options=_build(Options, values),
        values=values,
    )


def _refuse_lora(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options of a new adapter, since that of `--adapter` has its own."""
    of_trl = {each.name: each for each in fields(ModelConfig) if each.name.startswith(("lora_", "use_rslora", "use_d"))}
    for name, each in of_trl.items():
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if values[name] != defaults.get(name, default):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"expected --adapter without {option}, since its own configuration decides; leave out one"
            )
    if not values["use_peft"]:
        raise ConfigError("expected --adapter with --use-peft true, found --use-peft false")


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind) if field.init}
    try:
        return kind(**{name: value for name, value in values.items() if name in known})
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"{kind.__name__} refuses these options: {error}") from error


class _Parser(TrlParser):
    """TRL's flags, without its exits."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`, with the nearest name for one that is unknown."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        first = unknown.split(" ", 1)[0].partition("=")[0]
        if not first:
            raise ConfigError(message)
        if not first.startswith("-"):
            raise ConfigError(f"{first!r} belongs to no option: MODEL comes first")
        raise ConfigError(f"there is no option {first}{_nearest(first.replace('_', '-'), self._option_string_actions)}")

    def words_of(self, config: Mapping[str, Any]) -> list[str]:
        """The words of a command line that say what `config` does; None becomes a default."""
        by_name = {action.dest: action for action in self._actions}
        words: list[str] = []
        for key, value in config.items():
            name = key.replace("-", "_")
            if name not in by_name:
                raise ConfigError(f"--config: there is no option {key!r}{_nearest(name, by_name)}")
            if value is None:
                self.set_defaults(**{name: None})
                continue
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
        return words


def _nearest(name: str, names: Iterable[str]) -> str:
    """A question for the names that are spelt alike, or that end with `name`, such as --per-device-train-batch-size."""
    known = [each for each in names if "_" not in each.lstrip("-") or not each.startswith("-")]
    word = name.lstrip("-")
    ends = [each for each in known if each.endswith((f"-{word}", f"_{word}"))]
    found = list(dict.fromkeys([*ends, *difflib.get_close_matches(name, known, 3)]))[:3]
    return f"; is it {' or '.join(found)}?" if found else "; --help names all"


def _word(value: object) -> str:
    if isinstance(value, (bool, dict)):
        return json.dumps(value)
    return str(value)


def _take_config(words: list[str]) -> dict[str, Any]:
    """The content of the file that `--config` names, which is taken out of `words`."""
    import yaml

    found: Any = {}
    for index, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if name != "--config":
            continue
        if not has_value and index + 1 == len(words):
            raise ConfigError("expected a YAML file after --config, found nothing")
        path = Path(value if has_value else words[index + 1])
        del words[index : index + (1 if has_value else 2)]
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path} is not YAML: {error}") from error
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ConfigError(f"--config {path}: expected `name: value` lines, found {type(found).__name__}")
        break
    return dict(found)


def _parser(*, preferences: bool) -> _Parser:
    kinds: Any = [DPOConfig if preferences else SFTConfig, ModelConfig, Options]
    # Ours come last, and take the names that they share with TRL's.
    parser = _Parser(kinds, conflict_handler="resolve", allow_abbrev=False, add_help=False)
    parser.set_defaults(**(DPO_DEFAULTS if preferences else DEFAULTS))
    actions = {action.dest: action for action in parser._actions}
    parser._option_string_actions["--output"] = actions["output_dir"]
    resume = actions["resume_from_checkpoint"]
    resume.nargs, resume.const = "?", "true"
    return parser


def show_help(examples: str, *, preferences: bool = False) -> str:
    """The text of `--help`: `examples`, our options, then TRL's, each by its whole name."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    kind = DPOConfig if preferences else SFTConfig
    own = {name for each in (kind, *kind.__mro__[1:2]) for name in vars(each).get("__annotations__", {})}
    groups: dict[str, list[argparse.Action]] = {
        "Options": [],
        f"Options of trl.{kind.__name__}": [],
        "Options of trl.ModelConfig": [],
        "Options of transformers.TrainingArguments": [],
    }
    of_surgery, of_model = ({field.name for field in fields(each)} for each in (Options, ModelConfig))
    for action in _parser(preferences=preferences)._actions:
        if not action.option_strings or action.option_strings[0].startswith("--no_"):
            continue
        if action.dest in of_surgery or action.dest in {"output_dir", "resume_from_checkpoint"}:
            groups["Options"].append(action)
        elif action.dest in _OURS:
            continue
        elif action.dest in own:
            groups[f"Options of trl.{kind.__name__}"].append(action)
        else:
            groups[
                f"Options of {'trl.ModelConfig' if action.dest in of_model else 'transformers.TrainingArguments'}"
            ].append(action)
    lines = [examples]
    for title, actions in groups.items():
        lines += ["", f"{title}:", *(line for action in actions for line in _describe(action, width))]
    return "\n".join(lines)


_TEXTS = {
    "output_dir": "Folder for checkpoints, the adapter (PEFT format), tokenizer, model card and summary.json.",
    "resume_from_checkpoint": "Go on from the newest checkpoint in --output, or from the folder that is named.",
}


def _describe(action: argparse.Action, width: int) -> Iterator[str]:
    """Lines of help on one option."""
    name = "--output" if action.dest == "output_dir" else f"--{action.dest.replace('_', '-')}"
    names = ",".join(map(str, action.choices or ()))
    kind = getattr(action.type, "__name__", "")
    value = {"string_to_bool": "", "int": "NUMBER", "float": "NUMBER"}.get(kind, "TEXT")
    if 0 < len(names) < _NAMES:
        value = f"{{{names}}}"
    head = f"  {name} {value}".rstrip() + (" ..." if action.nargs == "+" else "")
    text = _TEXTS.get(action.dest, action.help or "").replace("%%", "%")
    text = " ".join(text.split()) + (f" One of: {names.replace(',', ', ')}." if len(names) >= _NAMES else "")
    if action.default not in (None, argparse.SUPPRESS, [], False):
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        text += f" [default: {getattr(default, 'value', default)}]"
    body = textwrap.wrap(text, max(width - _NAMES, 20)) or [""]
    if len(head) >= _NAMES:
        yield head
    else:
        yield f"{head:<{_NAMES}}{body.pop(0)}"
    yield from (" " * _NAMES + line for line in body)
