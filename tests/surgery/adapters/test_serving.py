"""Adapters on experts as servers read them: the same change as stock PEFT makes, by factors of each projection."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import ConfigError, WeightsMismatchError
from surgery.quantizers.stack import stacks_of
from tests.helpers.models import save_tiny

WEIGHTS, START = "adapter_model.safetensors", "base_model.model."

#: Experts of which 2I, H, I, E and the rank all differ; all linear layers of the attention are of other shapes too.
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "head_dim": 8, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]

#: family -> changes of it, and of the adapter. PEFT doubles a rank where `gate_proj` and `up_proj` are meant.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ({"moe_intermediate_size": 24, "num_experts": 3}, {"rank_pattern": {"q_proj": 3}}),
    "mixtral": ({"num_local_experts": 3}, {"use_rslora": True, "rank_pattern": {"gate_up_proj": 2}}),
    "olmoe": (
        {"num_experts": 3, "intermediate_size": 24},
        {"target_parameters": BOTH[1:], "alpha_pattern": {"q_proj": 8}},
    ),
    "deepseek_v3": (
        {"moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1, "num_key_value_heads": 4,
         "topk_group": 1, "first_k_dense_replace": 1, **LATENT},
        {"target_modules": ["kv_b_proj", "gate_proj", "up_proj", "down_proj"], "target_parameters": None},
    ),
    "gpt_oss": ({"num_local_experts": 3}, {"target_parameters": BOTH[:1]}),
}  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module of an adapter's file, read by safetensors."""
    found = load_file(folder / WEIGHTS)
    names = [key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    assert len(found) == 2 * len(names)
    return {n.removeprefix(START): (found[f"{n}.lora_A.weight"], found[f"{n}.lora_B.weight"]) for n in names}


def merged_by_peft(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return tensors(out)


def save(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save an adapter of random values in both formats; PEFT's changes of experts, by the names of a checkpoint."""
    lora = {"target_modules": ["q_proj"], "target_parameters": BOTH, "r": 5, "lora_alpha": 15, **options}
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    with surgery.qlora(base, lora=config, quant=None, dtype=torch.float32, report=surgery.Report()) as model:
        surgery.save_adapter(model, folder / "peft")
        surgery.save_adapter(model, folder / "vllm", format="vllm")
        found: dict[str, torch.Tensor] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, ParamWrapper):
                path = name.removeprefix(START).replace(".base_layer", "")
                found |= by_projection(path, layer.parameter_name, layer.get_delta_weight("default"), layer)
        return found


def by_projection(path: str, parameter: str, delta: torch.Tensor, layer: Any) -> dict[str, torch.Tensor]:
    """The change of a stack by the names of a checkpoint; gpt-oss alone has a tensor of all experts there."""
    if layer.get_base_layer().is_transposed:
        return {f"{path}.{parameter}": delta}
    is_mixtral = "Mixtral" in type(layer.get_base_layer()).__name__
    path = path.replace(".mlp.", ".block_sparse_moe.") if is_mixtral else path
    names = (
        {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
        if is_mixtral
        else {"gate_up_proj": ("gate_proj", "up_proj")}
    )
    parts = names.get(parameter, (parameter,))
    return {
        f"{path}.{expert}.{part}.weight": rows
        for expert, each in enumerate(delta)
        for part, rows in zip(parts, each.chunk(len(parts)), strict=True)
    }


def change(module: str, a: torch.Tensor, b: torch.Tensor, base: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """The name of a weight and what vLLM, which views stacks so, adds to it, without the scale."""
    if f"{module}.weight" in base:
        return f"{module}.weight", b @ a
    name = f"{module.removesuffix('.base_layer')}.{'gate_up_proj' if module.endswith('.base_layer') else 'down_proj'}"
    number = len(base[name])
    return name, (b.view(len(b), -1, number).permute(2, 0, 1) @ a.view(number, -1, a.shape[1])).mT


@pytest.mark.filterwarnings("ignore:PEFT takes a part of target_modules:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_computes_what_stock_peft_merges(family: str, tmp_path: Path) -> None:
    changes, options = FAMILIES[family]
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32, **{**SHAPE, **changes})
    deltas = save(base, tmp_path, **options)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "peft"), str(tmp_path / "converted")])
    assert done.exit_code == 0, done.output
    said = f"Converted {tmp_path / 'peft'} for vLLM: "
    assert re.search(
        rf"^{re.escape(said)}[\d.]+ [KM]iB in {re.escape(str(tmp_path / 'converted'))}$", done.stderr, re.MULTILINE
    )
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "converted" / file).read_bytes() == (tmp_path / "vllm" / file).read_bytes()
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert not any(config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"))
    merged, before = merged_by_peft(base, tmp_path / "peft", tmp_path / "merged"), tensors(base)
    served = dict(change(module, a, b, before) for module, (a, b) in factors(tmp_path / "vllm").items())
    for name, product in served.items():
        delta = config["lora_alpha"] / config["r"] * product
        torch.testing.assert_close(before[name] + delta, merged[name], atol=1e-6, rtol=0)
        if "experts" in name and "shared" not in name:
            torch.testing.assert_close(delta, deltas.get(name, torch.zeros(())).expand_as(delta), atol=1e-6, rtol=0)
    assert {name for name in before if not torch.equal(before[name], merged[name])} <= served.keys()
    # vLLM takes all projections of a layer's experts, or none.
    assert {name for name in before if re.search(r"\.experts\.(\d+\.\w+\.weight|\w+_proj)$", name)} <= served.keys()
    assert {
        min(a.shape[0] % config["r"], b.shape[1] % config["r"]) for a, b in factors(tmp_path / "vllm").values()
    } == {0}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_same_files_over_experts_in_4_bits(family: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32, **{**SHAPE, **FAMILIES[family][0]})
    save(base, tmp_path)
    with surgery.qlora(base, adapter=tmp_path / "peft", dtype=torch.float32, report=surgery.Report()) as model:
        assert any(map(stacks_of, model.modules()))
        model.peft_config["default"].lora_dropout = 0.1  # with which stock PEFT would not load it
        surgery.save_adapter(model, tmp_path / "again")
        surgery.save_adapter(model, tmp_path / "vllm-again", format="vllm")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_dropout"] == 0
    for name in ("peft/again", "vllm/vllm-again"):
        one, other = (load_file(tmp_path / folder / WEIGHTS) for folder in name.split("/"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen3_moe", dtype=torch.float32, **SHAPE, **FAMILIES["qwen3_moe"][0])
    other = save_tiny(tmp_path / "other", "qwen3_moe", **SHAPE, moe_intermediate_size=24, num_experts=4)
    save(base, tmp_path)
    peft, out, before = tmp_path / "peft", tmp_path / "out", (tmp_path / "vllm" / WEIGHTS).read_bytes()
    for arguments, says in (
        ([peft, out, "--base", other], r"in PEFT's format, found missing, unknown or of other shapes"),
        ([peft, peft, "--overwrite"], "another folder than"),
        ([peft, tmp_path / "vllm"], "already has an adapter"),
        ([peft, base, "--overwrite"], "model"),
        ([tmp_path / "vllm", out], "PEFT's format"),
        ([out, out], "nothing at"),
    ):
        done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        assert (done.exit_code, re.search(says, done.output) is not None, out.exists()) == (2, True, False), done.output
    assert (tmp_path / "vllm" / WEIGHTS).read_bytes() == before
    with pytest.raises(WeightsMismatchError, match="experts are one by one, as servers and"):
        surgery.qlora(base, adapter=tmp_path / "vllm", quant=None, report=surgery.Report())
    undecorated = {"num_local_experts": 2, "intermediate_size_mlp": 48, "layer_types": ["full_attention"] * 2}
    llama = save_tiny(tmp_path / "llama", "llama4_text", **SHAPE, **undecorated)
    with pytest.raises(ConfigError, match=r"expected experts of which transformers says .* found a Llama4TextExperts"):
        save(llama, tmp_path / "of-llama")
    config = LoraConfig(target_modules=["q_proj"], use_dora=True)
    with surgery.qlora(base, lora=config, quant=None, report=surgery.Report()) as model:
        with pytest.raises(ConfigError, match="plain LoRA for vLLM, found one with use_dora"):
            surgery.save_adapter(model, out, format="vllm")
        with pytest.raises(ConfigError, match="expected 'peft' or 'vllm', found 'gguf'"):
            surgery.save_adapter(model, out, format="gguf")  # type: ignore[arg-type]
    assert not out.exists()
