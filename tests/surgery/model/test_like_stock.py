"""A model is what transformers loads in 4 bits: its dtypes and buffers, and what is set on modules and configs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

import surgery
from surgery.config import FSDP1, FSDP2
from surgery.errors import ConfigError
from surgery.model.skeleton import build_on_meta
from surgery.quantizers.base import format_for
from surgery.sharding.base import strategy_for
from surgery.sharding.fsdp import check_kept
from tests.helpers.models import save_tiny, tiny_config

#: transformers leaves experts in 16 bits.
AS_STOCK = surgery.Quant(experts=False)

HEAD = {"head_dim": 16}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}

#: By name: the model type, and what its config changes. Chosen to be of different kinds.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "scaled rotary": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "two rotaries": ("gemma3_text", HEAD),
    "sines in float32": ("gptj", {"rotary_dim": 8}),
    "sines of every layer": ("codegen", {"n_head": 4, "rotary_dim": 8}),
    "positions": ("xglm", {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 112}),
    "masks": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "transposed": ("gpt2", {}),
    "projected": ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 32}),
    "fused": ("bloom", {}),
    "router": ("deepseek_v2", {**LATENT, **ROUTED, "q_lora_rank": None, "topk_method": "greedy"}),
    "router and bias": ("deepseek_v3", {**LATENT, **ROUTED, "q_lora_rank": 16}),
    "router, other heads": ("glm4_moe", {**ROUTED, **HEAD}),
    "bias as parameter": ("ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "bare bias": ("afmoe", {**EXPERTS, **HEAD, "num_experts": 4, "num_dense_layers": 1}),
    "sinks": ("flint", {**ROUTED, **HEAD}),
    "two dtypes in a module": ("olmo_hybrid", {**HYBRID, **LINEAR, "linear_value_head_dim": 16}),
    "decay": ("kimi_linear", {**LATENT, **ROUTED, **HYBRID, "linear_num_heads": 4, "linear_head_dim": 16}),
    "quantized from float32": (
        "hy_v4",
        {**ROUTED, **LATENT, "q_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 2, "dtype": torch.float32},
    ),
    "made in float32, quantized from the model's": (
        "hunyuan_v1_moe",
        {**HEAD, "num_experts": 4, "moe_topk": 1},
    ),
    "slopes": ("minimax", {**HEAD, **HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "asks whether it is quantized": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "asks too": ("falcon_mamba", {"state_size": 8}),
}

#: Families that keep more in float32 if the rest is in float16.
HALF = {
    "norms": ("gpt_oss", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "some norms": FAMILIES["bare bias"],
    "time": ("rwkv", {"attention_hidden_size": 64}),
}

CASES = [
    *((torch.bfloat16, *FAMILIES[name], name) for name in FAMILIES),
    *((torch.float16, *HALF[name], name) for name in HALF),
]

#: What we set otherwise, or not at all, and why.
DIFFERENCES = {
    "training": "it is there to be trained, and dropout counts then; transformers leaves that to the trainer",
    "config.use_cache": "a training step has no use for keys and values of earlier ones",
    "hf_quantizer": "`save_pretrained` is refused, which ends in an error of another thing in stock",
    "_weight_conversions": "how the names of this checkpoint were read: without it transformers takes its own tables",
}


def stock_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    """As a user of transformers loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )


def described(value: Any) -> Any:
    """What can be compared of an attribute's value: all of it, or its type."""
    if isinstance(value, (type(None), str, int, float, bool, tuple, set, dict, torch.dtype, type)):
        return value if not isinstance(value, dict) else sorted(map(str, value))
    if isinstance(value, list):
        return sorted(map(str, value))
    if hasattr(value, "to_dict"):
        return {name: described(each) for name, each in value.to_dict().items() if name != "use_cache"}
    if type(value).__name__ == "Bnb4BitHfQuantizer":
        return {name: described(each) for name, each in vars(value).items()}
    return type(value)


def differences(ours: Any, stock: Any) -> Iterator[str]:
    """Attributes of modules, configs, and the generation config that are not the same."""
    theirs = dict(stock.named_modules())
    for fqn, module in ours.named_modules():
        one, other = vars(module), vars(theirs[fqn])
        yield from (name for name in one.keys() ^ other.keys())
        yield from (name for name in one.keys() & other.keys() if described(one[name]) != described(other[name]))
        if hasattr(module, "config"):
            one, other = vars(module.config), vars(theirs[fqn].config)
            yield from (f"config.{name}" for name in one.keys() ^ other.keys())
            yield from (f"config.{name}" for name in one.keys() & other.keys() if str(one[name]) != str(other[name]))
    if ours.generation_config.to_dict() != stock.generation_config.to_dict():
        yield "generation_config"


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def quantized_from(model: nn.Module) -> dict[str, torch.dtype]:
    """FQN of every 4-bit layer -> dtype that its weight had."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return {name: layer.weight.quant_state.dtype for name, layer in layers.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def forward(model: nn.Module) -> torch.Tensor:
    """Logits, with the same dropout for all."""
    torch.manual_seed(0)
    ids = torch.randint(3, 96, (2, 16))
    with torch.no_grad():
        logits: torch.Tensor = model.train()(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize(("dtype", "kind", "changes"), [case[:3] for case in CASES], ids=[case[3] for case in CASES])
def test_a_model_is_what_upstream_loads(tmp_path: Path, dtype: torch.dtype, kind: str, changes: dict[str, Any]) -> None:
    checkpoint = save_tiny(tmp_path, kind, **changes)
    settings = {"do_sample": True, "temperature": 0.25, "eos_token_id": 5, "use_cache": True}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    stock = stock_model(checkpoint, dtype)
    drawn = torch.get_rng_state()
    with surgery.qlora(checkpoint, quant=AS_STOCK, dtype=dtype, report=surgery.Report()) as model:
        assert torch.equal(torch.get_rng_state(), drawn), "torch's generator has been used"
        found, wanted = tensors(model), tensors(stock)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []
        assert quantized_from(model) == quantized_from(stock)
        assert isinstance(model, type(stock))
        assert set(differences(model, stock)) - DIFFERENCES.keys() == set()
        assert torch.equal(forward(model), forward(stock))


def test_every_named_difference_is_one(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path)
    with surgery.qlora(checkpoint, quant=AS_STOCK, report=surgery.Report()) as model:
        assert set(differences(model, stock_model(checkpoint, torch.bfloat16))) == set(DIFFERENCES)


def test_skipped_modules_are_in_the_config(tmp_path: Path) -> None:
    """So that what reads the model's config, or loads by it, quantizes the same modules."""
    from transformers import AutoModelForCausalLM

    checkpoint = save_tiny(tmp_path)
    quant = surgery.Quant(skip_modules=(r"layers\.0\..*up_proj",))
    with surgery.qlora(checkpoint, quant=quant, report=surgery.Report()) as model:
        found: Any = model
        again = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=found.config.quantization_config, dtype=torch.bfloat16
        )
        quantized = [{n for n, m in each.named_modules() if isinstance(m, Linear4bit)} for each in (model, again)]
    assert quantized[0] == quantized[1]
    assert len(quantized[0]) == 13


def test_trainer_and_peft_see_a_quantized_model(tmp_path: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    with surgery.qlora(save_tiny(tmp_path), report=surgery.Report()) as model:
        with pytest.raises(ValueError, match="purely quantized"):
            validate_quantization_for_training(model)
        with pytest.raises(ValueError, match="cast"):
            model.to(torch.float16)


def skeleton(kind: str, **changes: Any) -> nn.Module:
    """A model on meta in bfloat16."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **changes)
    return build_on_meta(
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def checked(model: nn.Module, shard: FSDP1 | FSDP2) -> frozenset[str]:
    """FQNs of what stays whole."""
    return strategy_for(shard).check_model(model, format_for(surgery.Quant(), dtype=torch.bfloat16))


def test_nothing_but_computed_buffers_leaves_meta() -> None:
    model = skeleton("gptj", rotary_dim=8)
    assert {name for name, tensor in tensors(model).items() if not tensor.is_meta} == {
        name for name, _ in model.named_buffers()
    }


@pytest.mark.parametrize("shard", [FSDP1, FSDP2])
def test_casting_what_is_kept_is_refused(shard: type[FSDP1 | FSDP2]) -> None:
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    precision = MixedPrecision if shard is FSDP1 else MixedPrecisionPolicy
    cast = precision(param_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"would cast .*: a\.weight, b \(2 in all\)"):
        check_kept(cast, ["a.weight", "b"], {}, torch.bfloat16)
    check_kept(cast, [], {"c": torch.float32}, torch.bfloat16)
    check_kept(None, ["a.weight"], {"c": torch.float32}, torch.bfloat16)


def test_casting_computed_buffers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"buffer_dtype=torch\.bfloat16 would cast .*rotary_emb\.inv_freq"):
        checked(skeleton("llama"), FSDP1(mixed_precision=MixedPrecision(buffer_dtype=torch.bfloat16)))
    checked(skeleton("llama"), FSDP1(mixed_precision=MixedPrecision(buffer_dtype=torch.float32)))


def test_fsdp1_leaves_whole_what_is_kept_and_fsdp2_gathers_it() -> None:
    model = skeleton("glm4_moe", **FAMILIES["router, other heads"][1])
    gate = "model.layers.1.mlp.gate.weight"
    assert checked(model, FSDP1()) == {gate}
    assert checked(model, FSDP2()) == frozenset()
    with pytest.raises(ConfigError, match=gate):
        checked(model, FSDP2(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
