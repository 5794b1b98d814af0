"""The plugin of axolotl, called by the `PluginManager` and beside the patches of the release that it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import save_tiny

pytestmark = pytest.mark.network

ROOT = Path(__file__).parents[3]

PROGRAM = '''
import gc
import sys

import torch
from accelerate import accelerator
from axolotl.integrations.base import PluginManager
from axolotl.loaders.patch_manager import PatchManager
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import patches
import surgery

manager = PluginManager.get_instance()
manager.register("surgery.integrations.axolotl.SurgeryPlugin")
(plugin,) = manager.plugins.values()
before = accelerator.fsdp2_prepare_model, dict(vars(FSDPParam))


def config(**changes):
    sizes = dict.fromkeys(("context_parallel_size", "tensor_parallel_size"), 1)  # as axolotl fills them in
    return DictDefault(load_in_4bit=True, adapter="qlora", base_model=sys.argv[1], **{**sizes, **changes})


def active():
    return {receipt.patch.id for receipt in patches.active()}


def load(cfg):
    """The hooks and patches of ModelLoader.load(), in its order."""
    plugin.register(cfg)
    patching = PatchManager(cfg=cfg, model_config=AutoConfig.from_pretrained(cfg.base_model))
    patching._apply_fsdp_patches()
    patching._apply_fsdp2_bnb_patches()
    manager.pre_model_load(cfg)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(cfg.base_model, quantization_config=quantization, dtype=torch.bfloat16)
    manager.post_model_build(cfg, model)
    model.tie_weights()
    manager.pre_lora_load(cfg, model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    manager.post_lora_load(cfg, model)
    manager.post_model_load(cfg, model)
    return [parameter.is_meta for parameter in model.parameters() if not parameter.requires_grad]


# Under FSDP2 accelerate will fill the model, by its own path.
cfg = config(fsdp_version=2, fsdp_config={"cpu_ram_efficient_loading": False})
assert all(load(cfg))
assert cfg.lora_mlp_kernel is False
manager.post_train_unload(cfg)
gc.collect()  # of the model, which carries the patch that would fill it
assert (accelerator.fsdp2_prepare_model, dict(vars(FSDPParam))) == before

# In one process it is filled when it has its adapters.
cfg = config()
assert not any(load(cfg))
manager.post_train_unload(cfg)
assert not active() & {"transformers.bind-at-load", "axolotl.stock-prepare"}, active()

# What does not go together is refused when the YAML is read; a configuration that axolotl rejects leaves nothing.
for refused in ({"deepspeed": "zero3.json"}, {"lora_qkv_kernel": True}, {"tensor_parallel_size": 2}):
    try:
        plugin.register(config(**refused))
    except surgery.ConfigError as error:
        assert next(iter(refused)) in str(error), error
    else:
        raise AssertionError(refused)
plugin.register(config())
assert "transformers.bind-at-load" in active()
manager.on_config_validation_error(DictDefault(plugins=list(manager.plugins)))

# Other jobs are left alone.
for other in (config(inference=True), config(merge_lora=True), DictDefault(adapter="lora")):
    plugin.register(other)
    assert "transformers.bind-at-load" not in active()
'''


def test_axolotl_calls_its_hooks(tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, "axolotl==0.19.0", "addict==2.4.0"], timeout=120, check=True)
    model = save_tiny(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT))), "AXOLOTL_DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
