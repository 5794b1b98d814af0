"""Decoder-only models of transformers, and plain modules, through the whole recipe in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

import surgery
from tests.helpers.models import save_tiny

HEAD = {"head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 14),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, 14),
    "mistral": ("mistral", {}, 14),
    "qwen2": ("qwen2", {}, 14),
    "qwen3": ("qwen3", HEAD, 14),
    "gemma": ("gemma", HEAD, 14),
    "gemma3": ("gemma3_text", HEAD, 14),
    "phi": ("phi", {}, 12),
    "phi3": ("phi3", {}, 8),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, 8),
    "opt": ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 64}, 12),
    "gpt-neox": ("gpt_neox", {}, 8),
    "bloom": ("bloom", {}, 8),
    "olmo2": ("olmo2", {}, 14),
    "mixtral": ("mixtral", {"num_local_experts": 4}, 8),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **HEAD},
        8,
    ),
}


def stock_model(directory: Path) -> nn.Module:
    """The unquantized model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def logical(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`weight` as `(out, in)`: GPT-2 keeps it the other way."""
    return weight.t().contiguous() if type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_what_upstream_loads(tmp_path: Path, name: str) -> None:
    """4-bit weights are the quantized form, and everything else the very values, of what `from_pretrained` loads."""
    kind, changes, count = MODELS[name]
    checkpoint = save_tiny(tmp_path, kind, **changes)
    expected = stock_model(checkpoint)
    with surgery.qlora(checkpoint, quant=surgery.Quant(experts=False), report=surgery.Report()) as model:
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        assert len(quantized) == count
        for fqn, module in quantized.items():
            stock = expected.get_submodule(fqn)
            packed, state = quantize_4bit(
                logical(stock.weight.data, stock),  # type: ignore[arg-type]
                blocksize=64,
                compress_statistics=True,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
            )
            assert torch.equal(packed.view(torch.uint8), module.weight.data.view(torch.uint8))
            assert torch.equal(state.absmax, module.quant_state.absmax)
        skipped = {f"{fqn}.weight" for fqn in quantized}
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
        assert found.keys() == wanted.keys()
        for fqn in wanted.keys() - skipped:
            assert torch.equal(found[fqn], wanted[fqn]), fqn


@pytest.mark.parametrize("name", MODELS)
def test_adapters_get_gradients(tmp_path: Path, name: str) -> None:
    kind, changes, _ = MODELS[name]
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with surgery.qlora(save_tiny(tmp_path, kind, **changes), lora=lora, report=surgery.Report()) as model:
        ids = torch.arange(3, 35).view(2, 16)
        model(input_ids=ids).logits.float().logsumexp(-1).mean().backward()
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert trainable
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)


CONVERTED: dict[str, dict[str, int]] = {
    "llama": {},
    "gpt2": {
        "transformer.h.*.attn.c_attn.weight": 2,
        "transformer.h.*.attn.c_proj.weight": 2,
        "transformer.h.*.mlp.c_fc.weight": 2,
        "transformer.h.*.mlp.c_proj.weight": 2,
    },
    "mixtral": {},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_no_rank_can_read_by_ranges_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kind, changes, _ = MODELS[name]
    report = surgery.Report(show_progress=True)
    with surgery.qlora(save_tiny(tmp_path, kind, **changes), report=report):
        pass
    assert report.read_once_per_node == CONVERTED[name]
    said = [line for line in capsys.readouterr().err.splitlines() if "read once per node" in line]
    assert len(said) == bool(CONVERTED[name])
    assert all(f"{pattern} (" in line for line in said for pattern in CONVERTED[name])


def test_ties_are_kept(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    with surgery.qlora(checkpoint, report=surgery.Report()) as model:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


class Plain(nn.Module):
    """No model of transformers: a shared layer, a persistent and a non-persistent buffer, a Linear that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(2))
        self.again = self.layers[0][0]
        self.out = nn.Linear(32, 8)
        self.register_buffer("scale", torch.ones(32))
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x * self.scale)
        return self.out(x) + self.again(x)[..., :8] + self.table


def test_plain_module_with_matching_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = Plain()
    stock.scale.mul_(2)  # type: ignore[operator]
    state = {name: tensor for name, tensor in stock.state_dict().items() if not name.startswith("again.")}
    save_file(state, tmp_path / "model.safetensors")
    quant = surgery.Quant(skip_modules=("^out$",), double_quant=False)
    lora = LoraConfig(r=2, target_modules=r"layers\.\d\.[02]")
    with surgery.qlora(
        tmp_path, model=Plain, quant=quant, lora=lora, dtype=torch.float32, report=surgery.Report()
    ) as model:
        base = model.get_base_model()  # type: ignore[operator]
        assert type(base.out) is nn.Linear
        assert torch.equal(base.out.weight, stock.out.weight)
        assert torch.equal(base.scale, stock.scale)
        assert torch.equal(base.table, stock.table)
        assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 4
        assert base.again is base.layers[0][0] or base.again is base.layers[0][0].base_layer
        x = torch.randn(5, 32)
        relative = (model(x) - stock(x)).norm() / stock(x).norm()
        assert 0 < relative < 0.2
