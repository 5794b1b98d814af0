"""Where settings are found, and which place decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.doctor.settings import Settings, read_settings
from surgery.errors import ConfigError

SCRIPT = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

NAME = "./llama"
tokenizer = AutoTokenizer.from_pretrained("./tokenizer")
quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_use_double_quant=True)
with surgery.low_memory():
    model = AutoModelForCausalLM.from_pretrained(NAME, quantization_config=quant, dtype=torch.bfloat16)
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True, cpu_offload=unknown())
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
"""

ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: 4
mixed_precision: bf16
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: true
parallelism_config:
  parallelism_config_dp_replicate_size: 2
  parallelism_config_dp_shard_size: 2
"""


def told(settings: Settings, *names: str) -> dict[str, tuple[object, str]]:
    return {name: (settings.found[name].value, settings.found[name].source) for name in names}


def test_the_file_of_accelerate_gives_way_to_the_environment_and_that_to_arguments(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text(ACCELERATE)
    settings = read_settings({}, config_file=file)
    assert (settings.fsdp_version, settings.number("world_size"), settings.precision) == (2, 4, "bfloat16")
    assert settings.mesh == (2, 2)
    assert settings.is_on("fsdp.offload_params")
    assert not settings.is_on("use_cpu")
    launched = {"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    settings = read_settings(launched, config_file=file, arguments=["--fsdp_config", '{"cpu_offload": false}'])
    assert told(settings, "world_size", "fsdp.version", "fsdp.offload_params") == {
        "world_size": ("8", "WORLD_SIZE="),
        "fsdp.version": ("1", "FSDP_VERSION="),
        "fsdp.offload_params": (False, "--fsdp_config"),
    }


def test_fsdp_has_the_version_that_whoever_turns_it_on_means() -> None:
    assert read_settings({}).fsdp_version == 0
    assert read_settings({}, arguments=["--fsdp", "False"]).fsdp_version == 0
    assert read_settings({"ACCELERATE_USE_FSDP": "true"}).fsdp_version == 1
    assert read_settings({}, arguments=["--fsdp"]).fsdp_version == 2
    offloads = read_settings({}, arguments=["--fsdp", "full_shard offload"])
    assert offloads.fsdp_version == 2
    assert offloads.is_on("fsdp.offload_params")


def test_a_script_says_in_its_calls_what_its_arguments_do_not(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    settings = read_settings({}, script=script, arguments=["--model_name_or_path=./other", "--no-use-peft"])
    assert told(settings, "model", "use_peft", "bnb_4bit_quant_storage", "low_memory", "lora_target_modules") == {
        "model": ("./other", "--model_name_or_path"),
        "use_peft": (False, "--no-use-peft"),
        "bnb_4bit_quant_storage": ("bfloat16", "train.py, line 7"),
        "low_memory": (True, "train.py, line 8"),
        "lora_target_modules": (["q_proj"], "train.py, line 11"),
    }
    assert read_settings({}, script=script).get("model") == "./llama"
    assert settings.fsdp_version == 2
    assert settings.is_on("fsdp.activation_checkpointing")
    assert "fsdp.offload_params" not in settings.found  # nobody knows without running it
    script.write_text("def (")
    assert read_settings({}, script=script).found == {}


def test_trl_reads_a_file_of_its_own_and_has_its_own_defaults(tmp_path: Path) -> None:
    file, script = tmp_path / "run.yaml", tmp_path / "sft.py"
    file.write_text("model_name_or_path: ./llama\nfsdp: true\nfsdp_config:\n  fsdp_version: 1\nmax_length: 64\n")
    script.write_text("from trl import ModelConfig, SFTConfig\n")
    settings = read_settings({}, script=script, arguments=["--config", str(file), "--lora_target_modules", "q", "v"])
    assert (settings.get("model"), settings.fsdp_version, settings.number("max_length")) == ("./llama", 1, 64)
    assert settings.get("lora_target_modules") == ["q", "v"]
    assert (settings.precision, settings.get("lora_r"), settings.is_on("use_peft")) == ("bfloat16", 16, False)
    assert settings.is_on("gradient_checkpointing")
    assert settings.found["gradient_checkpointing"].source == "default of SFTConfig"


def test_what_is_named_and_cannot_be_read_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match="accelerate config"):
        read_settings({}, config_file=bad)
    with pytest.raises(ConfigError, match="file of YAML"):
        read_settings({}, arguments=["--config", str(bad)])
    with pytest.raises(ConfigError, match="JSON or a file of it"):
        read_settings({}, arguments=["--fsdp_config", str(bad)])
    good = tmp_path / "fsdp.json"
    good.write_text(json.dumps({"fsdp_version": 1}))
    assert read_settings({}, arguments=["--fsdp", "--fsdp_config", str(good)]).fsdp_version == 1
