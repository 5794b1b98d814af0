"""The adapters that are counted are those that PEFT makes."""

from __future__ import annotations

from collections import Counter

import pytest
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from surgery.planning.adapters import adapter_tensors
from tests.helpers.models import tiny_config

CONFIGS = {
    "all": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "some": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "default": LoraConfig(r=2, task_type="CAUSAL_LM"),
    "patterns": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 8}, task_type="CAUSAL_LM"),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_peft(name: str) -> None:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(tiny_config())
    counted = Counter(tensor.shape.numel() for tensor in adapter_tensors(model, CONFIGS[name]))
    adapted = get_peft_model(model, CONFIGS[name])
    assert counted == Counter(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted
