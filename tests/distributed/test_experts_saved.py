"""Adapters trained over experts in 4 bits: stock PEFT merges just what is in the file, and a server gets the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.config import FSDP2
from surgery.quantizers.stack import stacks_of
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

FILE, LAYERS, RANK, ALPHA = "adapter_model.safetensors", 2, 4, 6
HIDDEN, EXPERTS = 64, 5

#: family -> changes of it, and I: neither it nor 2I is H. A router with a bias would leave experts out.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3_moe": ({"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 48}, 48),
    "gpt_oss": ({"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS, "head_dim": 16}, 112),
}

Arrays = dict[str, "np.ndarray[Any, Any]"]


def train_and_save(folder: Path, rank_count: int) -> None:
    """Train an adapter of each family for three steps on this rank, and save it both ways."""
    for family in FAMILIES:
        torch.manual_seed(0)
        lora = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.1,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            task_type="CAUSAL_LM",
        )
        options: dict[str, Any] = {"dtype": torch.float32, "report": surgery.Report()}
        shard = FSDP2() if rank_count > 1 else None
        with surgery.qlora(folder / family, lora=lora, shard=shard, **options) as model:
            assert any(map(stacks_of, model.modules()))
            optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=20.0)
            for step in range(3):
                ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(step))
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            for form in ("peft", "vllm"):
                surgery.save_adapter(model, folder / f"{family}-{rank_count}-{form}", format=form)


def change(file: Arrays, module: str) -> np.ndarray[Any, Any]:
    """What a pair of stacked factors adds to each expert, `(E, out, in)`: A has the expert slowest, B fastest."""
    a, b = (file[f"base_model.model.{module}.lora_{end}.weight"].astype(np.float64) for end in "AB")
    assert (len(a), b.shape[1]) == (EXPERTS * RANK, EXPERTS * RANK)
    return np.stack([b[:, e::EXPERTS] @ a[e * RANK : (e + 1) * RANK] for e in range(EXPERTS)]) * (ALPHA / RANK)


def changes(file: Arrays, intermediate: int) -> Arrays:
    """The changes of all stacks of a file in PEFT's format, by the names of the model; each of every expert."""
    found = {}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.mlp.experts"
        gate_up, down = change(file, f"{path}.base_layer"), change(file, path)
        assert gate_up.shape[1:] == (2 * intermediate, HIDDEN)
        assert down.shape[1:] == (HIDDEN, intermediate)
        found |= {f"{path}.gate_up_proj": gate_up, f"{path}.down_proj": down}
    assert all(np.abs(each).max(axis=(1, 2)).min() > 1e-3 for each in found.values()), "every expert has learnt"
    return found


def merged_by_peft(base: Path, adapter: Path) -> Arrays:
    """What stock PEFT adds to the stacks of the model in 16 or 32 bits, `(E, out, in)`, by their names."""
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: each.clone() for name, each in stock.state_dict().items()}
    is_turned = {name: module.is_transposed for name, module in stock.named_modules() if hasattr(module, "has_gate")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = PeftModel.from_pretrained(stock, adapter).merge_and_unload().state_dict()
    return {
        f"{path}.{leaf}": (delta.mT if turned else delta).numpy()
        for path, turned in is_turned.items()
        for leaf in ("gate_up_proj", "down_proj")
        for delta in [after[f"{path}.{leaf}"] - before[f"{path}.{leaf}"]]
    }


def require_each_expert(served: Arrays, expected: Arrays, intermediate: int) -> None:
    """Require of a converted file the factors of each projection of each expert, and nothing else of experts."""
    left = {name for name in served if ".experts." in name}
    for name, stack in expected.items():
        path, leaf = name.rsplit(".", 1)
        rows = {"gate_proj": slice(intermediate), "up_proj": slice(intermediate, None)}
        for expert, delta in enumerate(stack):
            for part, own in rows.items() if leaf == "gate_up_proj" else [(leaf, slice(None))]:
                keys = [f"base_model.model.{path}.{expert}.{part}.lora_{end}.weight" for end in "AB"]
                a, b = (served[key] for key in keys)
                assert a.shape == (RANK, stack.shape[2])
                np.testing.assert_allclose(b @ a * (ALPHA / RANK), delta[own], atol=1e-6)
                left -= {*keys}
    assert not left


@pytest.mark.parametrize("world_size", [1, 2])
def test_stock_peft_and_servers_get_what_was_trained(world_size: int, tmp_path: Path) -> None:
    for family, (options, _) in FAMILIES.items():
        save_tiny(tmp_path / family, family, dtype=torch.float32, **options)
    run_ranks(train_and_save, world_size, tmp_path, world_size)
    for family, (_, intermediate) in FAMILIES.items():
        saved, served = (tmp_path / f"{family}-{world_size}-{form}" for form in ("peft", "vllm"))
        file = load_file(saved / FILE)
        expected = changes(file, intermediate)
        found = merged_by_peft(tmp_path / family, saved)
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            np.testing.assert_allclose(found[name], each, atol=1e-6)
        config = json.loads((served / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
        if family == "qwen3_moe":
            require_each_expert(load_file(served / FILE), expected, intermediate)
        else:
            other = load_file(served / FILE)
            assert other.keys() == file.keys()
            assert all(np.array_equal(other[key], each) for key, each in file.items())
