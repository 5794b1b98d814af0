"""What is saved is what PEFT would save, by its keys: of the active adapter, with buffers, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

import surgery
from surgery.adapters.rehearsal import rehearse
from surgery.adapters.save import by_peft_key
from surgery.errors import AdapterError, ConfigError
from surgery.model.twin import twin_of
from surgery.quantizers.base import format_for
from surgery.sharding.base import strategy_for
from tests.distributed.kept import ROUTED
from tests.helpers.models import save_tiny

IDS = torch.arange(3, 13).view(2, 5)


class Scale(nn.Module):
    """A parameter, and a buffer that a state dict has, and one that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))
        self.register_buffer("seen", torch.zeros(16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = Scale()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def checkpoint_of(model: nn.Module, folder: Path) -> Path:
    torch.manual_seed(0)
    save_file({name: torch.randn_like(value) for name, value in model.state_dict().items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def test_buffers_of_modules_to_save_are_in_the_file(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["first"], modules_to_save=["scale"])
    file = checkpoint_of(Plain(), tmp_path)
    with surgery.qlora(file, model=Plain, lora=lora, dtype=torch.float32, report=surgery.Report()) as model:
        surgery.save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in saved} == {
        "first.lora_A.weight",
        "first.lora_B.weight",
        "scale.gain",
        "scale.seen",
    }
    assert torch.equal(saved["base_model.model.scale.seen"], load_file(file)["scale.seen"])


class Forgetful(Scale):
    """Leaves a parameter out of its own state dict, which is what PEFT saves of a module."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}gain"]


class Forgotten(Scale):
    """Has copies that are forgetful."""

    def __deepcopy__(self, memo: object) -> Scale:
        return Forgetful()


def test_what_would_be_trained_and_not_saved_is_refused_before_a_weight_is_read(
    tmp_path: Path, reads: list[str]
) -> None:
    def build() -> nn.Module:
        model = Plain()
        model.scale = Forgotten()
        return model

    file = checkpoint_of(Plain(), tmp_path)
    lora = LoraConfig(r=2, target_modules=["first"], modules_to_save=["scale"])
    with pytest.raises(
        ConfigError, match=r"could be trained, and not be saved: .*scale\.modules_to_save\.default\.gain"
    ):
        surgery.qlora(file, model=build, lora=lora, report=surgery.Report())
    assert reads == []


@pytest.fixture
def adapted(tiny: Path) -> Iterator[Any]:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with surgery.qlora(tiny, lora=lora, dtype=torch.float32, report=surgery.Report()) as model:
        yield model


def test_the_active_adapter_is_saved(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    other = LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    adapted.add_adapter("other", other)
    adapted.set_adapter("other")
    surgery.save_adapter(adapted, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, tmp_path).named_parameters())
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 + 1
    for name, parameter in trained.items():
        assert torch.equal(loaded[name.replace(".other", ".default")], parameter), name


@pytest.mark.parametrize("names", [["default", "other"], []])
def test_several_active_adapters_or_none(adapted: Any, tmp_path: Path, names: list[str]) -> None:
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.base_model.set_adapter(names)
    with pytest.raises(ConfigError, match=f"expected one active adapter, found {len(names)}.*set_adapter"):
        surgery.save_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_peft_leaves_out_is_named(adapted: Any) -> None:
    state = surgery.adapter_state(adapted) | {"base_model.model.model.norm.weight": torch.ones(64)}
    with pytest.raises(AdapterError, match=r"left out 1 of 5 .*model\.norm\.weight") as caught:
        by_peft_key(adapted, state)
    assert caught.value.missing == ("base_model.model.model.norm.weight",)
    with pytest.raises(AdapterError, match="there is none"):
        by_peft_key(adapted, {})


LAGUNA = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def test_what_peft_would_not_read_back_is_refused_before_a_weight_is_read(tmp_path: Path, reads: list[str]) -> None:
    """Its loader takes `mlp.shared_experts` for the `mlp.shared_expert.` of Laguna's checkpoints."""
    checkpoint = save_tiny(tmp_path, "laguna", **LAGUNA)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    reads.clear()
    with pytest.raises(ConfigError, match=r"save 6 of .* not find them .*layers\.1\.mlp\.shared_experts\.down_proj"):
        surgery.qlora(checkpoint, lora=lora, report=surgery.Report())
    assert reads == []


def test_what_is_left_of_it_is_read_back(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path, "laguna", **LAGUNA)
    lora = LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=r".*\.shared_experts\..*", init_lora_weights=False
    )
    with surgery.qlora(checkpoint, lora=lora, dtype=torch.float32, report=surgery.Report()) as model:
        surgery.save_adapter(model, tmp_path / "adapter")
        wanted = surgery.adapter_state(model)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    again = dict(PeftModel.from_pretrained(stock, tmp_path / "adapter").named_parameters())
    assert len(wanted) > 20
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())


class Stacked(nn.Module):
    """Blocks of which the last has a layer of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3))
        self.layers[2][1] = self.layers[0][1]  # type: ignore[index]


def test_blocks_that_share_a_layer_are_refused_under_fsdp2_though_they_are_alike() -> None:
    with torch.device("meta"):
        model = Stacked()
    lora = LoraConfig(r=2, target_modules=r"layers\.\d\.0")
    quant = format_for(None, dtype=torch.float32)
    assert rehearse(model, lora, quantized={}, quant=quant, strategy=strategy_for(None))
    with pytest.raises(ConfigError, match="are one parameter, but are used in two groups of FSDP2"):
        rehearse(model, lora, quantized={}, quant=quant, strategy=strategy_for(surgery.FSDP2()))


def test_a_twin_has_no_wrappers_and_is_nobody_elses() -> None:
    inner = Plain()
    model = nn.Sequential(checkpoint_wrapper(inner), nn.ModuleDict({"again": inner.first}))
    made = twin_of(model, lambda fqn, module: {name: f"{fqn}:{name}" for name in module._parameters})  # type: ignore[misc]  # names will do
    twin: Any = made[model]
    assert [name for name, _ in twin.named_modules()] == ["", "0", "0.first", "0.last", "0.scale", "1"]
    assert twin[0].first is twin[1]["again"] is made[inner.first]
    assert twin[0].scale._parameters == {"gain": "0.scale:gain"}
    twin[0].register_forward_hook(lambda *_: None)
    twin[0].added = nn.Linear(1, 1)
    assert not inner._forward_hooks
    assert "added" not in inner._modules
    assert inner.scale._buffers["seen"] is twin[0].scale.seen  # type: ignore[union-attr]
    hollow: Any = twin_of(model, lambda *_: {}, hollow=[inner.scale])[model]  # type: ignore[list-item]
    assert not list(hollow[0].scale.buffers())


def tied_lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", [surgery.FSDP2(), surgery.FSDP1(), surgery.FSDP1(use_orig_params=True)], ids=str)
def test_adapters_that_peft_ties_are_refused_where_fsdp_would_part_them(
    tmp_path: Path, shard: surgery.FSDP1 | surgery.FSDP2, dtype: torch.dtype
) -> None:
    tied = save_tiny(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="by giving both the same memory"):
        surgery.plan(tied, world_size=2, shard=shard, dtype=dtype, lora=tied_lora())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_peft_ties_stay_tied_in_one_process(tmp_path: Path, dtype: torch.dtype) -> None:
    tied = save_tiny(tmp_path, tie_word_embeddings=True)
    with surgery.qlora(tied, lora=tied_lora(), dtype=dtype, report=surgery.Report()) as model:
        memory: dict[int, int] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == dtype
                place = parameter.untyped_storage().data_ptr()
                memory[place] = memory.get(place, 0) + 1
        assert sorted(memory.values())[-2:] == [2, 2]


def test_a_copy_of_what_upstream_keeps_in_float32_is_trained_in_float32(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "glm4_moe", **ROUTED)
    lora = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
    with surgery.qlora(folder, lora=lora, report=surgery.Report()) as model:
        gates = {p.dtype for name, p in model.named_parameters() if p.requires_grad and "gate" in name}
        others = {p.dtype for name, p in model.named_parameters() if p.requires_grad and "gate" not in name}
    assert (gates, others) == ({torch.float32}, {torch.bfloat16})
    assert surgery.plan(folder, world_size=2, shard=surgery.FSDP1(), lora=lora)
    with pytest.raises(ConfigError, match=r"FSDP2 trains parameters of one dtype .*gate.* is float32"):
        surgery.plan(folder, world_size=2, shard=surgery.FSDP2(), lora=lora)


def test_numbers_that_would_make_adapters_infinite(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="lora_alpha=nan: expected a finite number"):
        surgery.plan(tiny, world_size=1, lora=LoraConfig(target_modules=["q_proj"], lora_alpha=float("nan")))
