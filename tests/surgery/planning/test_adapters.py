"""The adapters that are counted are those that PEFT makes, whether one block stands for all or not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from surgery.adapters.rehearsal import Trained, rehearse
from surgery.errors import ConfigError, SelectorError
from surgery.quantizers.base import format_for
from surgery.sharding.base import strategy_for
from tests.helpers.models import tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "some": {"target_modules": ["q_proj", "down_proj"]},
    "default": {},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 8}},
    "a pattern of one layer": {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\..*": 2}},
    "one layer by its name": {"target_modules": ["layers.2.mlp.up_proj", "q_proj"]},
    "a regex": {"target_modules": r".*\.[02]\..*proj"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved by suffix": {"target_modules": ["q_proj"], "modules_to_save": ["layernorm"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
    "biases of targets": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
}


def model_of(model_type: str = "llama", **changes: Any) -> Any:
    options = {"attention_bias": True} if model_type == "llama" else {}
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, num_hidden_layers=3, **options, **changes))


def rehearsed(model: Any, lora: LoraConfig) -> tuple[Trained, ...]:
    plain = format_for(None, dtype=torch.bfloat16)
    return rehearse(model, lora, quantized={}, quant=plain, strategy=strategy_for(None))


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_peft(name: str) -> None:
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **CONFIGS[name])
    model = model_of()
    before = {fqn: (type(module), set(vars(module))) for fqn, module in model.named_modules()}
    counted = Counter(each.shape.numel() for each in rehearsed(model, lora))
    assert {fqn: (type(module), set(vars(module))) for fqn, module in model.named_modules()} == before
    with torch.device("meta"):
        adapted = get_peft_model(model, lora)
    assert counted == Counter(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counted


def test_every_block_has_its_own_names() -> None:
    found = rehearsed(model_of(), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    assert sorted(each.fqn for each in found if "q_proj" in each.fqn and not each.is_base) == sorted(
        f"model.layers.{layer}.self_attn.q_proj.lora_{matrix}.default.weight" for layer in range(3) for matrix in "AB"
    )
    base = dict(model_of().named_parameters())
    assert {each.fqn for each in found if each.is_base} == {name for name in base if name.endswith("bias")}


def test_fused_experts_are_counted() -> None:
    """By default PEFT adapts them and the router as parameters."""
    model = model_of("mixtral", num_local_experts=4)
    lora = LoraConfig(r=16, target_modules="all-linear")
    found = rehearsed(model, lora)
    with torch.device("meta"):
        adapted = get_peft_model(model, lora)
    assert sum(each.shape.numel() for each in found) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum("experts" in each.fqn for each in found) == 3 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": ["q_proj", "k_porj", "wo"]}, "target_modules: 'k_porj', 'wo' matches no module"),
        ({"target_modules": ["layers.7.mlp.up_proj", "q_proj"]}, r"'layers\.7\.mlp\.up_proj' matches no module"),
        ({"target_modules": r".*\.nowhere"}, "nowhere' matches no module"),
        ({"exclude_modules": ["mlp", "nowhere"]}, "exclude_modules: 'nowhere'"),
        ({"exclude_modules": r".*nowhere"}, r"exclude_modules: '\.\*nowhere'"),
        ({"modules_to_save": ["norm", "score"]}, "modules_to_save: 'score'"),
        ({"rank_pattern": {"q_proj": 2, "up_porj": 3}}, "rank_pattern: 'up_porj'"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern: 'lm_head'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 3]}, "layers_to_transform: '3'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [-1]}, "'-1'|not found|'q_proj'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "blocks"}, "q_proj|blocks|'1'"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight", "z.weight"]}, r"parameters: 'z\.weight'"),
        ({"trainable_token_indices": {"embed_tokens": [1], "wte": [2]}}, "trainable_token_indices: 'wte'"),
    ],
)
def test_a_name_that_matches_nothing(options: dict[str, Any], says: str) -> None:
    lora = LoraConfig(r=4, **{"target_modules": "all-linear", **options})
    with pytest.raises(ConfigError, match=says):
        rehearsed(model_of(), lora)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_whose_order_a_file_does_not_keep(option: str) -> None:
    overlapping = {"q_proj": 2, r".*\.1\.self_attn\.q_proj": 4}
    with pytest.raises(ConfigError, match=f"{option}: 'q_proj' and .* both match .*1.self_attn.q_proj"):
        rehearsed(model_of(), LoraConfig(r=4, target_modules=["q_proj"], **{option: overlapping}))
    kept = dict(sorted(overlapping.items()))
    assert rehearsed(model_of(), LoraConfig(r=4, target_modules=["q_proj"], **{option: kept}))


@pytest.mark.parametrize("indices", [[0, 96], [-1], {"embed_tokens": [1000]}])
def test_tokens_that_are_not_there(indices: Any) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    with pytest.raises(ConfigError, match=r"(96|-1|1000) is no row of model\.embed_tokens, which has 96"):
        rehearsed(model_of(), lora)


def test_what_peft_cannot_build_says_why() -> None:
    with pytest.raises(ConfigError, match=r"PEFT cannot build these adapters: .*even"):
        rehearsed(model_of(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="orthogonal"))
    with pytest.raises(SelectorError, match="'nothing' matches no module of MixtralForCausalLM") as caught:
        rehearsed(_unknown_family(), LoraConfig(r=4))
    assert caught.value.patterns == ("nothing",)


def _unknown_family() -> Any:
    model = model_of("mixtral", num_local_experts=4)
    model.config.model_type = "unheard-of"
    return model
