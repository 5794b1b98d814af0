"""Checkpoints that must be refused, as data: what was done to a good one, and what the error has to say."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, ConfigError, SurgeryError, WeightsMismatchError

__all__ = ["DAMAGES", "Damage", "edit_config", "edit_tensors"]

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"

#: What remote code would do if anything imported it.
REMOTE_CODE = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """`apply(folder)` spoils a sharded checkpoint of a tiny llama; the error is of `kind` and has all of `says`."""

    name: str
    apply: Callable[[Path], Any]
    kind: type[SurgeryError] = CheckpointError
    says: tuple[str, ...]


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write the tensors again, into one file, after `change` has had its way with them."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def _point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_PROJ] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _truncate(folder: Path) -> None:
    shard = _shard_of(folder, Q_PROJ)
    shard.write_bytes(shard.read_bytes()[:-8])


def _overlap(folder: Path) -> None:
    """Corrupt the header: one tensor's bytes begin one element early, inside its neighbour's."""
    shard = _shard_of(folder, Q_PROJ)
    content = shard.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header[Q_PROJ]["data_offsets"][0] += 2
    spoiled = json.dumps(header).encode().ljust(size)
    shard.write_bytes(struct.pack("<Q", len(spoiled)) + spoiled + content[8 + size :])


def _drop_from_shard(folder: Path) -> None:
    shard = _shard_of(folder, Q_PROJ)
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != Q_PROJ}, shard)


def _leave_pickles_only(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _add_remote_code(folder: Path) -> None:
    (folder / "modeling_other.py").write_text(REMOTE_CODE)
    auto_map = {"AutoConfig": "modeling_other.OtherConfig", "AutoModelForCausalLM": "modeling_other.Other"}
    edit_config(folder, model_type="other", auto_map=auto_map)


def _say_in_config(folder: Path, text: str) -> None:
    """Put `text`, which need not be JSON, at the end of config.json's object."""
    file = folder / "config.json"
    file.write_text(f"{file.read_text().rstrip().removesuffix('}')}, {text}}}")


#: Changes of config.json that no headers of a tiny llama can go with, and what the error calls them.
CONTRADICTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000"),
    ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer is 1,000,000,000"),
    ({"model_type": "qwen2", "num_hidden_layers": 10**11}, "num_hidden_layers is 100,000,000,000"),
    ({"num_hidden_layers": 10**900}, "num_hidden_layers is a number of 901 digits"),
    ({"num_hidden_layers": 900}, "describes a model of more than"),
    ({"hidden_size": 10**9}, "hidden_size is 1,000,000,000"),
    ({"intermediate_size": 10**15}, "intermediate_size is 1,000,000,000,000,000"),
    ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
    ({"head_dim": 10**4}, "describes a model of more than"),
    ({"head_dim": 10**9}, "head_dim is 1,000,000,000"),
    ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers is 10,000,000"),
)


def _all() -> Iterator[Damage]:
    for changes, says in CONTRADICTIONS:
        yield Damage(
            name="-".join(f"{key}-of-{len(str(value))}-digits" for key, value in changes.items()),
            apply=lambda folder, changes=changes: edit_config(folder, **changes),
            kind=WeightsMismatchError,
            says=("config.json and the weights are not of the same model", says),
        )
    for name, text, says in (
        ("a-number-without-end", f'"hidden_size": {"1" * 5000}', "a number of 5000 digits"),
        ("a-number-of-a-megabyte", f'"x": [-{"9" * 2**20}]', "a number of 1048577 digits"),
        ("nested-without-end", f'"x": {"[" * 200_000}{"]" * 200_000}', "nested too deeply"),
        ("a-key-twice", '"vocab_size": 3', "'vocab_size' appears twice"),
        ("no-number", '"num_hidden_layers": NaN', "config.json"),
    ):
        yield Damage(
            name=f"config-with-{name}",
            apply=lambda folder, text=text: _say_in_config(folder, text),
            kind=SurgeryError if name == "no-number" else CheckpointError,
            says=(says,),
        )
    yield Damage(name="missing-directory", apply=shutil.rmtree, says=("no checkpoint at",))
    yield Damage(
        name="missing-shard",
        apply=lambda folder: _shard_of(folder, Q_PROJ).unlink(),
        says=("model-0000", ".safetensors", "missing"),
    )
    yield Damage(name="index-outside", apply=_point_outside, says=("../elsewhere.safetensors", Q_PROJ))
    yield Damage(name="truncated", apply=_truncate, says=("model-0000", "v_proj", "the file has"))
    yield Damage(name="corrupt", apply=_overlap, says=("model-0000", Q_PROJ))
    yield Damage(
        name="wrong-shape",
        apply=lambda folder: edit_tensors(folder, lambda t: t.update({Q_PROJ: torch.zeros(64, 32)})),
        kind=WeightsMismatchError,
        says=(Q_PROJ, "(64, 64)", "(64, 32)", "model.safetensors"),
    )
    for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn):
        yield Damage(
            name=f"wrong-dtype-{dtype}".replace("torch.", ""),
            apply=lambda folder, dtype=dtype: edit_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(dtype)})),
            kind=WeightsMismatchError,
            says=(Q_PROJ, str(dtype), "bfloat16", "model.safetensors"),
        )
    yield Damage(
        name="missing-key",
        apply=lambda folder: edit_tensors(folder, lambda t: t.pop(Q_PROJ)),
        kind=WeightsMismatchError,
        says=("1 parameters no tensor fills", Q_PROJ),
    )
    yield Damage(
        name="key-of-another-name",
        apply=lambda folder: edit_tensors(folder, lambda t: t.update({f"other.{Q_PROJ}": t.pop(Q_PROJ)})),
        kind=WeightsMismatchError,
        says=("1 parameters no tensor fills", "1 tensors that fit nowhere", f"other.{Q_PROJ}"),
    )
    yield Damage(
        name="in-the-index-alone",
        apply=_drop_from_shard,
        kind=WeightsMismatchError,
        says=("1 parameters no tensor fills", f"its index lists {Q_PROJ}, but no file holds it"),
    )
    yield Damage(
        name="fewer-layers-than-the-config",
        apply=lambda folder: edit_config(folder, num_hidden_layers=3),
        kind=WeightsMismatchError,
        says=("9 parameters no tensor fills", "model.layers.2."),
    )
    yield Damage(
        name="weights-of-another-name",
        apply=lambda folder: edit_config(folder, transformers_weights="other.safetensors"),
        says=("config.json", "other.safetensors", "transformers_weights"),
    )
    yield Damage(
        name="adapter-beside",
        apply=lambda folder: (folder / "adapter_config.json").write_text("{}"),
        says=("adapter_config.json", "transformers would load"),
    )
    yield Damage(name="pickle-only", apply=_leave_pickles_only, says=("pytorch_model.bin", "safetensors"))
    yield Damage(
        name="quantized-by-config",
        apply=lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        says=("quantized already", "GPTQ"),
    )
    yield Damage(
        name="quantized-by-name",
        apply=lambda folder: edit_tensors(folder, lambda t: t.update({f"{Q_PROJ}.absmax": torch.zeros(2)})),
        says=("not complete", f"{Q_PROJ}.quant_state.bitsandbytes__nf4 or fp4, found none"),
    )
    yield Damage(
        name="torn-config",
        apply=lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
        says=("config.json",),
    )
    yield Damage(name="no-config", apply=lambda folder: (folder / "config.json").unlink(), says=("has no config.json",))
    yield Damage(
        name="unknown-architecture",
        apply=lambda folder: edit_config(folder, model_type="no-such-model"),
        kind=ConfigError,
        says=("no-such-model", "transformers cannot use"),
    )
    yield Damage(
        name="no-decoder",
        apply=lambda folder: edit_config(folder, model_type="t5"),
        kind=ConfigError,
        says=("'t5' has no causal language model",),
    )
    yield Damage(name="remote-code", apply=_add_remote_code, kind=ConfigError, says=("transformers cannot use",))
    yield Damage(
        name="impossible-config",
        apply=lambda folder: edit_config(folder, num_attention_heads="four"),
        kind=ConfigError,
        says=("config.json", "num_attention_heads"),
    )
    yield Damage(
        name="attention-from-the-hub",
        apply=lambda folder: edit_config(folder, _attn_implementation="nobody/kernels"),
        kind=ConfigError,
        says=("config.json", "nobody/kernels"),
    )


DAMAGES = tuple(_all())
