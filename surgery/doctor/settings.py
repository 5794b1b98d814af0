"""Settings of a training job, where they are found: accelerate's file, environment, a script's source and arguments."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

from surgery.checkpoint.checkpoint import read_config
from surgery.checkpoint.packed import configuration
from surgery.errors import CheckpointError, ConfigError
from surgery.telemetry.numbers import whole_number

__all__ = ["DEFAULT", "EXPERTS", "Found", "Settings", "read_settings"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A value, and where it was found."""

    value: Any
    source: str


Layer: TypeAlias = dict[str, Found]

#: Settings that other libraries name differently, by those names.
SYNONYMS = {
    "activation_checkpointing": "gradient_checkpointing",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "cpu": "use_cpu",
    "cpu_offload": "fsdp.offload_params",
    "evaluation_strategy": "eval_strategy",
    "fsdp.cpu_offload": "fsdp.offload_params",
    "fsdp.fsdp_version": "fsdp.version",
    "max_seq_length": "max_length",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_processes": "world_size",
    "pretrained_model_name_or_path": "model",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "torch_dtype": "dtype",
}

#: The 4-bit type of fused experts, which `surgery.low_memory` alone has a word for.
EXPERTS = "low_memory.experts"

#: Settings that a diagnosis or a plan depends on, in the order in which they are shown.
NAMES = (
    "model",
    "world_size",
    "use_cpu",
    "fsdp",
    "fsdp.version",
    "fsdp.sharding_strategy",
    "fsdp.reshard_after_forward",
    "fsdp.cpu_ram_efficient_loading",
    "fsdp.offload_params",
    "fsdp.activation_checkpointing",
    "dp_replicate_size",
    "dp_shard_size",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_quant_storage",
    "use_bnb_nested_quant",
    "dtype",
    "mixed_precision",
    "bf16",
    "fp16",
    "use_peft",
    "lora_r",
    "lora_target_modules",
    "eval_strategy",
    "per_device_train_batch_size",
    "max_length",
    "gradient_checkpointing",
    "optim",
    "low_memory",
    EXPERTS,
)

ENVIRONMENT = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_USE_CPU": "use_cpu",
    "ACCELERATE_USE_FSDP": "fsdp",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "dp_replicate_size",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "dp_shard_size",
    "WORLD_SIZE": "world_size",
    **{f"FSDP_{name[5:].upper()}": name for name in NAMES if name.startswith("fsdp.")},
}

#: Calls in a script whose keyword arguments are settings, beside those whose names end like a trainer's.
CALLS = ("Accelerator", "BitsAndBytesConfig", "FullyShardedDataParallelPlugin", "LoraConfig", "from_pretrained")
TRAINERS = ("DPOConfig", "ModelConfig", "SFTConfig", "TrainingArguments")

#: Settings of bitsandbytes that a packed model has; where it says so, and as the source of what it decides.
PACKED = ("load_in_4bit", "load_in_8bit")
BY_MODEL = (*PACKED, "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant")
STORED = "the model's config.json"

#: The source of what nobody has chosen begins so.
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `NAMES` that were found, each from the place that decides."""

    found: Mapping[str, Found]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or `default`."""
        found = self.found.get(name)
        return default if found is None or found.value is None else found.value

    def is_on(self, name: str, default: bool = False) -> bool:  # noqa: FBT001, FBT002 - as `get`
        """Whether that is set to anything but a word for no."""
        return str(self.get(name, default)).lower() not in {"", "0", "false", "no", "none", "off"}

    def number(self, name: str) -> int | None:
        """The whole number of that name, or None."""
        return whole_number(str(self.get(name, "")))

    def word(self, name: str) -> str:
        """The value of that name in lower case, without the module of a dtype; "" if there is none."""
        return str(self.get(name, "")).lower().removeprefix("torch.")

    @property
    def fsdp_version(self) -> int:
        """1 or 2, or 0 without FSDP. transformers' arguments mean 2 where they say nothing, accelerate 1."""
        if not self.is_on("fsdp"):
            return 0
        return self.number("fsdp.version") or (1 if _is_accelerates(self.found["fsdp"].source) else 2)

    @property
    def is_packed(self) -> bool:
        """Whether the model is packed already, in 4 or 8 bits, so that no `BitsAndBytesConfig` decides."""
        return any(name in self.found and self.found[name].source == STORED for name in PACKED)

    @property
    def storage(self) -> str:
        """Dtype that packs 4-bit weights; bitsandbytes' default is uint8. "" without such weights."""
        return (self.word("bnb_4bit_quant_storage") or "uint8") if self.is_on("load_in_4bit") else ""

    @property
    def precision(self) -> str:
        """Dtype that computes under mixed precision, or ""."""
        # TRL means bf16 unless fp16 is chosen.
        chosen = [dtype for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")) if self.is_on(name)]
        named = {"bf16": "bfloat16", "fp16": "float16"}.get(self.word("mixed_precision"), "")
        return chosen[0] if chosen else named

    @property
    def mesh(self) -> tuple[int, int] | None:
        """`(replicate, shard)` of hybrid sharding, or None."""
        replicas, shards = self.number("dp_replicate_size") or 1, self.number("dp_shard_size") or 1
        return (replicas, shards) if replicas > 1 else None

    def say(self, *names: str) -> str:
        """Those settings of `names` that were found, with their sources."""
        found = ((name, self.found[name]) for name in names if name in self.found)
        return ", ".join(f"{name}={each.value} ({each.source})" for name, each in found)


def read_settings(
    environment: Mapping[str, str],
    *,
    config_file: Path | None = None,
    script: Path | None = None,
    arguments: Sequence[str] = (),
    experts: str | None = None,
) -> Settings:
    """Settings from every place; the later of these decides: the file, environment, source, `--config`, arguments.

    experts: what `--experts` of this command says, where the source says nothing.
    Raises `ConfigError` for a file that is named and cannot be read.
    """
    asked = {} if experts is None else {EXPERTS: Found(value=experts, source="--experts")}
    layers = [asked, _of_file(config_file) if config_file is not None else {}, _of_environment(environment)]
    source = _parsed(script)
    given = _of_arguments(arguments)
    if source is not None and script is not None:
        layers = [_of_defaults(source), *layers, _of_source(source, script.name)]
    if "config" in given:
        layers.append(_of_yaml(Path(str(given["config"].value))))
    merged: Layer = {}
    for layer in (*layers, given):
        merged |= _expanded({SYNONYMS.get(name, name): found for name, found in layer.items()})
    if "lora_r" in merged or "lora_target_modules" in merged:
        merged.setdefault("use_peft", Found(value=True, source=merged[min(merged.keys() & _LORA)].source))
    if "model" in merged:
        merged |= {SYNONYMS.get(name, name): found for name, found in _of_model(str(merged["model"].value)).items()}
    return Settings(found={name: merged[name] for name in NAMES if name in merged})


_LORA = {"lora_r", "lora_target_modules"}


def _is_accelerates(source: str) -> bool:
    return source.startswith(("ACCELERATE_", "accelerate's", "FullyShardedDataParallelPlugin"))


def _expanded(layer: Layer) -> Layer:
    """The layer, with an entry for each entry of `fsdp_config`, and for what a legacy value of `fsdp` says."""
    expanded = dict(layer)
    config = expanded.pop("fsdp_config", None)
    if config is not None:
        entries = {f"fsdp.{key.removeprefix('fsdp_')}": value for key, value in _as_dict(config).items()}
        # What the same layer says otherwise, by a name of its own, is more particular.
        found = {SYNONYMS.get(key, key): Found(value=value, source=config.source) for key, value in entries.items()}
        expanded = found | expanded
    fsdp = expanded.get("fsdp")
    if fsdp is not None and "offload" in str(fsdp.value).split():
        expanded.setdefault("fsdp.offload_params", fsdp)
    return expanded


def _as_dict(config: Found) -> Mapping[str, Any]:
    """A dictionary, JSON, or a file of JSON, as transformers takes it."""
    if isinstance(config.value, Mapping):
        return config.value
    text = str(config.value)
    try:
        read = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected fsdp_config ({config.source}) to be JSON or a file of it: {error}") from error
    return read if isinstance(read, Mapping) else {}


def _of_environment(environment: Mapping[str, str]) -> Layer:
    return {
        name: Found(value=environment[key], source=f"{key}=")
        for key, name in ENVIRONMENT.items()
        if environment.get(key)
    }


def _of_file(path: Path) -> Layer:
    """The settings of accelerate's file, read as accelerate reads it."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(str(path)).to_dict()
    except Exception as error:
        raise ConfigError(f"expected {path} to be a file of `accelerate config`: {error}") from error
    prefix = "parallelism_config_"
    mesh = {key.removeprefix(prefix): value for key, value in (config.get("parallelism_config") or {}).items()}
    plain = {key: config[key] for key in ("num_processes", "mixed_precision", "use_cpu") if key in config}
    values = {**mesh, **plain, "fsdp_config": config.get("fsdp_config") or {}}
    values["fsdp"] = config.get("distributed_type") == "FSDP"
    return {name: Found(value=value, source=f"accelerate's {path.name}") for name, value in values.items()}


def _of_model(name: str) -> Layer:
    """The settings of a model that is packed already, from which transformers does not depart whatever is asked."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name of a repository
            return {}
        folder = Path(cached).parent if isinstance(cached, str) else folder
    try:
        stored = configuration(read_config(folder) or {}) or {}
    except CheckpointError:  # which planning says
        return {}
    if not any(stored.get(name) for name in PACKED):
        return {}
    return {name: Found(value=value, source=STORED) for name, value in stored.items() if name in BY_MODEL}


def _of_yaml(path: Path) -> Layer:
    """The settings in the file of TRL's `--config`; none, if it is a file of something else."""
    import yaml

    if path.suffix not in {".yaml", ".yml"}:
        return {}
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"expected --config to be a file of YAML: {error}") from error
    mapping = read if isinstance(read, dict) else {}
    return {str(name): Found(value=value, source=path.name) for name, value in mapping.items()}


def _of_arguments(arguments: Sequence[str]) -> Layer:
    """The options of a command line: `--name value`, `--name=value`, `--name`, `--no_name`; dashes for underscores."""
    found: Layer = {}
    for at, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        written, equals, value = word.partition("=")
        name = written[2:].replace("-", "_")
        values = [value] if equals else list(takewhile(lambda each: not each.startswith("--"), arguments[at + 1 :]))
        if not values and name.startswith("no_"):
            found[name[3:]] = Found(value=False, source=written)
        found[name] = Found(value=values[0] if len(values) == 1 else values or True, source=written)
    return found


def _parsed(script: Path | None) -> ast.Module | None:
    """The source of a script; None if Python would not take it either."""
    if script is None:
        return None
    try:
        return ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _of_source(source: ast.Module, name: str) -> Layer:
    """The literals in a script's calls that are settings, and whether it uses `surgery.low_memory` itself."""
    constants = _constants(source)
    found: Layer = {}
    for call in (node for node in ast.walk(source) if isinstance(node, ast.Call)):
        callee = _last_name(call.func)
        where = f"{name}, line {call.lineno}"
        if callee == "low_memory":
            found["low_memory"] = Found(value=True, source=where)
            found |= {
                f"low_memory.{key}": Found(value=value, source=where)
                for key, value in _keywords(call, callee, constants)
            }
        elif callee in CALLS or callee in TRAINERS:
            found |= {key: Found(value=value, source=where) for key, value in _keywords(call, callee, constants)}
    return found


def _keywords(call: ast.Call, callee: str, constants: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keyword arguments that are literals, by the names of settings."""
    if callee == "FullyShardedDataParallelPlugin":
        yield "fsdp", True
    if callee == "LoraConfig":
        yield "use_peft", True
    if callee == "from_pretrained" and call.args and "Model" in ast.unparse(call.func):
        yield from (("model", value) for value in _values(call.args[0], constants))
    for keyword in call.keywords:
        name = keyword.arg or ""
        if callee == "FullyShardedDataParallelPlugin":
            name = f"fsdp.{name.removeprefix('fsdp_')}"
        yield from ((name, value) for value in _values(keyword.value, constants))


def _values(node: ast.expr, constants: Mapping[str, Any]) -> Iterator[Any]:
    """The value of an expression, if it is a literal, a dtype, or a name that is given one literal in the script."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
        yield node.attr
    elif isinstance(node, ast.Name) and node.id in constants:
        yield constants[node.id]
    else:
        try:
            yield ast.literal_eval(node)
        except ValueError:
            return


def _constants(source: ast.Module) -> dict[str, Any]:
    """Names at the top of a script that stand for one literal."""
    found: dict[str, Any] = {}
    for node in source.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found |= dict.fromkeys([name], next(_values(node.value, {}), None))
    return {name: value for name, value in found.items() if value is not None}


def _of_defaults(source: ast.Module) -> Layer:
    """Defaults of the trainer's arguments that the script imports, which TRL and transformers set differently."""
    import dataclasses
    import importlib

    found: Layer = {}
    for node in ast.walk(source):
        if not isinstance(node, ast.ImportFrom) or node.module not in {"transformers", "trl"}:
            continue
        for name in (alias.name for alias in node.names if alias.name in TRAINERS):
            fields = dataclasses.fields(getattr(importlib.import_module(node.module), name))
            plain = {field.name: field.default for field in fields if field.default not in {None, dataclasses.MISSING}}
            if node.module == "trl" and "fp16" in plain:
                plain.setdefault("bf16", True)
            found |= {key: Found(value=value, source=f"{DEFAULT} of {name}") for key, value in plain.items()}
    return found


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
