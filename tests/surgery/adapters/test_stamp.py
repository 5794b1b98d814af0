"""Adapters that are copied from one block to those like it are those that PEFT makes of each."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from surgery.adapters.attach import adapted_by_peft, adapting, appearing_real
from surgery.adapters.deferred import DeferredValues, Drawing, Undrawn
from surgery.adapters.stamp import adapted_undrawn
from surgery.config import Quant
from surgery.model.skeleton import build_on_meta
from surgery.passes.replace import Replace, quantizable
from surgery.quantizers.base import formats_for
from tests.helpers.models import tiny_config

#: PEFT says what of the options does not fit a model, and LORAS are for all of MODELS.
pytestmark = pytest.mark.filterwarnings("ignore")

DTYPE = torch.bfloat16

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 3, "n_embd": 64, "n_head": 4},  # transposed weights, biases
    # Blocks of two kinds, in turn.
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 3},
    # A dense block before those with experts.
    "deepseek_v3": {
        "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "qwen3_moe": {
        "num_hidden_layers": 3, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16,
        "decoder_sparse_step": 2,  # experts in every second block
    },
    "mixtral": {"num_hidden_layers": 3, "num_local_experts": 2},
}  # fmt: skip

LORAS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "names": {
        "target_modules": ["q_proj", "self_attn.o_proj", "c_attn"], "lora_bias": True, "bias": "lora_only",
        "lora_dropout": 0.1,
    },
    "with the ends": {"target_modules": ["lm_head", "q_proj", "embed_tokens", "c_attn", "wte"], "bias": "all"},
    "patterns": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 3, "mlp.down_proj": 5, "c_attn": 2},
        "alpha_pattern": {"v_proj": 7}, "use_rslora": True, "exclude_modules": ["k_proj"],
    },
    "parameters": {
        "target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "init_lora_weights": "gaussian",
    },
    "a layer by its parameter": {"target_modules": ["q_proj"], "target_parameters": ["gate_proj.weight"]},
    "frozen": {"target_modules": "all-linear", "inference_mode": True, "init_lora_weights": False},
    "some layers": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1]},
    "one block's": {"target_modules": ["q_proj", "c_attn"], "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    "a regular expression": {"target_modules": r".*\.1\.(self_attn.q_proj|attn.c_attn)"},
}  # fmt: skip


def skeleton(name: str, *, quantized: bool) -> nn.Module:
    """A tiny model on meta, its linear layers and experts as they are packed if `quantized`."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(name, **MODELS[name])
    model = build_on_meta(lambda: AutoModelForCausalLM.from_config(config), dtype=DTYPE, device=torch.device("cpu"))
    formats = formats_for(Quant(), dtype=DTYPE, compute_dtype=DTYPE) if quantized else ()
    for kind, found in quantizable(model, formats).items() if formats else ():
        Replace(quant=kind, chosen=found).run(model)
    return model


def adapted_plainly(model: nn.Module, lora: LoraConfig) -> tuple[Any, DeferredValues]:
    """The model as PEFT alone adapts all of it."""
    with appearing_real(model), Undrawn() as undrawn:
        adapted = adapted_by_peft(model, lora, DTYPE)
    return adapted, undrawn.take(adapted)


def drawn(model: nn.Module, deferred: DeferredValues) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The values of adapters by name, and the state of the generator after them."""
    torch.manual_seed(3)
    drawing = Drawing(
        deferred=deferred,
        rng_state=torch.get_rng_state(),
        rows=range,
        device=torch.device("cpu"),
        stop=threading.Event(),
    )
    drawing.run()
    drawing.go_on()
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = [initial.places[0] for initial in deferred.parameters]
    held = [names[module._parameters[leaf]] for module, leaf in places]  # type: ignore[index]
    return dict(zip(held, drawing.values, strict=True)), torch.get_rng_state()


def described(value: Any, names: dict[int, str]) -> Any:
    """`value` in a form that is equal for attributes that mean the same in two models; modules by their `names`."""
    if isinstance(value, nn.Module):
        return names.get(id(value), type(value))
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, dict):
        return {key: described(held, names) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(each, names) for each in value]
    return value if isinstance(value, (bool, int, float, str, set, torch.dtype, type(None))) else type(value)


def everything(model: nn.Module) -> dict[str, Any]:
    """Every module by name, with its class and all that it has."""
    names = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: (type(module), described(vars(module), names)) for name, module in every}


def require_same(name: str, options: str, *, quantized: bool = False) -> None:
    """Require that one block of a kind for all is the same as all blocks one by one."""
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **LORAS[options])
    plain, model = (skeleton(name, quantized=quantized) for _ in range(2))
    with adapting(plain):
        expected, asked = adapted_plainly(plain, lora)
    with adapting(model):
        adapted, deferred = adapted_undrawn(model, lora, DTYPE)
    assert everything(adapted) == everything(expected)
    assert vars(adapted.active_peft_config) == vars(expected.active_peft_config)
    values, state = drawn(adapted, deferred)
    wanted, after = drawn(expected, asked)
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[key], wanted[key]) for key in wanted)
    assert torch.equal(state, after)


CASES = [
    ("llama", "all linear"), ("llama", "frozen"), ("llama", "some layers"), ("llama", "one block's"),
    ("llama", "a regular expression"), ("gpt2", "names"), ("gpt2", "with the ends"), ("gemma3_text", "patterns"),
    ("deepseek_v3", "all linear"), ("qwen3_moe", "parameters"), ("mixtral", "all linear"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES)
def test_is_what_peft_makes(name: str, options: str) -> None:
    require_same(name, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, "all linear") for name in ("llama", "qwen3_moe", "deepseek_v3")] + [("llama", "a layer by its parameter")],
)
def test_is_what_peft_makes_of_packed_layers(name: str, options: str) -> None:
    require_same(name, options, quantized=True)


@pytest.mark.parametrize(("options", "count"), [("all linear", 2 * 7), ("one block's", 6)])
def test_asks_peft_once_for_a_kind_of_block(options: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = create_autospec(LoraModel._create_and_replace, side_effect=LoraModel._create_and_replace)
    monkeypatch.setattr(LoraModel, "_create_and_replace", asking)
    adapted_undrawn(skeleton("gemma3_text", quantized=False), LoraConfig(r=4, **LORAS[options]), DTYPE)
    assert asking.call_count == count
