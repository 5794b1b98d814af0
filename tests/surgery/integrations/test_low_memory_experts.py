"""`surgery.low_memory(experts=)`: fused experts in 4 bits in somebody's script, as `surgery.qlora` has them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import patches
import surgery
from families.compare import differences
from surgery.quantizers.experts import Experts4bit
from surgery.quantizers.stack import stacks_of
from tests.helpers.models import save_tiny, tiny_config
from tests.helpers.ranks import run_ranks

IDS = torch.arange(3, 15).reshape(2, 6)

#: Families, and what they are tiny by. The one has its experts transposed, with biases.
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 48},
}

#: What `surgery.qlora` leaves in 16 bits where the configuration of transformers says nothing of 4.
DENSE = ("proj$",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(root / family, family, **sizes) for family, sizes in MOE.items()}


def four_bits(storage: torch.dtype = torch.bfloat16, **options: Any) -> dict[str, Any]:
    chosen = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": storage}
    compute = {"bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **chosen, **compute, **options)}


def bound(folder: Path, experts: Any = "nf4", kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    with surgery.low_memory(experts=experts):
        model = kind.from_pretrained(folder, **{"dtype": torch.bfloat16, **options})
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is read"
    return model


def filled(folder: Path, **options: Any) -> Any:
    return surgery.fill(bound(folder, **options))


def packed(model: Any) -> list[str]:
    return [f"{prefix}.{name}" for prefix, module in model.named_modules() for name in stacks_of(module)]


def classes(model: Any) -> Counter[str]:
    """Modules by class, and the dtypes of what they hold."""
    return Counter(f"{type(m).__name__} {p.dtype}" for m in model.modules() for p in m.parameters(recurse=False))


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("dense", ["4 bits", "16 bits"])
def test_a_filled_model_is_that_of_qlora(family: str, dense: str, folders: dict[str, Path]) -> None:
    skipped, options = ((), four_bits()) if dense == "4 bits" else (DENSE, {})
    wanted = surgery.qlora(
        folders[family], quant=surgery.Quant(skip_modules=skipped), dtype=torch.bfloat16, report=surgery.Report()
    )
    model = filled(folders[family], **options)
    assert list(differences(model, wanted)) == []
    assert len(packed(model)) == 4
    assert sum(type(module).__name__ == "Linear4bit" for module in model.modules()) == (8 if dense == "4 bits" else 0)
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, wanted.train()(IDS).logits)
    for each in (model, wanted):
        surgery.release(each)


def test_a_model_of_which_experts_alone_are_packed_is_not_cast(folders: dict[str, Path]) -> None:
    """A cast would take bytes in a floating-point storage for numbers, and training would go on with garbage."""
    with filled(folders["qwen3_moe"]) as model:
        with torch.no_grad():
            logits = model(IDS).logits
        for cast in (model.half, model.float, lambda: model.to(torch.float16), lambda: model.to(dtype=torch.float32)):
            with pytest.raises(ValueError, match="cast"):
                cast()
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, logits)


def test_experts_multiply_in_the_dtype_of_the_model_whatever_linear_layers_do(folders: dict[str, Path]) -> None:
    found: dict[str, list[torch.Tensor]] = {"self_attn.q_proj": [], "mlp.experts": []}
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    top_k = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.full((3, 2), 0.5, dtype=torch.bfloat16)
    for compute in (torch.bfloat16, torch.float32):
        quantization = four_bits()["quantization_config"]
        quantization.bnb_4bit_compute_dtype = compute
        with filled(folders["qwen3_moe"], quantization_config=quantization) as model, torch.no_grad():
            layer = model.model.layers[0]
            found["self_attn.q_proj"].append(layer.self_attn.q_proj(x))
            found["mlp.experts"].append(layer.mlp.experts(x, *top_k))
    assert not torch.equal(*found["self_attn.q_proj"])
    assert torch.equal(*found["mlp.experts"])
    formats = [Experts4bit(surgery.Quant(), dtype=x.dtype, compute_dtype=each) for each in (None, torch.float32)]
    assert len({each.dequantized_bytes(torch.Size((5, 64, 96))) for each in formats}) == 1


@pytest.mark.parametrize("experts", ["nf4", None])
@pytest.mark.parametrize("dense", [True, False])
def test_what_transformers_cannot_save_it_is_not_asked_to(
    dense: bool, experts: Any, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """But adapters are; and a model in 16 bits."""
    with filled(folders["qwen3_moe"], experts=experts, **(four_bits() if dense else {})) as model:
        if experts is None and not dense:
            model.save_pretrained(tmp_path / "whole")
            return
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
        assert "written by surgery.export(model, directory)" in caplog.text
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def adapters(targets: Any) -> LoraConfig:
    named = None if targets == "all-linear" else ["experts.gate_up_proj", "experts.down_proj"]
    return LoraConfig(r=2, target_modules=targets, target_parameters=named, task_type="CAUSAL_LM")


def trained(model: Any, out: Path) -> list[float]:
    """The losses of three steps of transformers' trainer, sharded where there are ranks; it saves in `out`."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    rows = torch.randint(3, 90, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    fsdp: Any = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **(fsdp if torch.distributed.is_initialized() else {}),
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    trainer.save_model(str(out))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_both_ways(folder: Path, targets: Any, out: Path, *, dense: bool) -> list[tuple[list[float], Counter[str]]]:
    """Losses, and the kinds of modules: in `low_memory` with PEFT, and by `surgery.qlora`."""
    shard = surgery.FSDP2() if torch.distributed.is_initialized() else None
    quant = surgery.Quant(skip_modules=() if dense else DENSE)
    found = []
    with patches.transaction("accelerate.fsdp-on-cpu", reason="no GPU here"):
        torch.manual_seed(0)
        base = bound(folder, **(four_bits() if dense else {}))
        torch.manual_seed(0)
        model: Any = get_peft_model(base, adapters(targets), autocast_adapter_dtype=False)
        found.append((trained(model, out / "ours"), classes(model)))
        surgery.release(model)
        torch.manual_seed(0)
        options: dict[str, Any] = {"shard": shard, "dtype": torch.bfloat16, "report": surgery.Report()}
        model = surgery.qlora(folder, quant=quant, lora=adapters(targets), **options)
        found.append((trained(model, out / "qlora"), classes(model)))
        surgery.release(model)
    return found


TRAINED: dict[str, tuple[Any, str, bool]] = {
    "linear and experts by name, all in 4 bits": (["q_proj", "v_proj"], "qwen3_moe", True),
    "all-linear, experts alone in 4 bits": ("all-linear", "gpt_oss", False),
}


def train_all(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    return {
        name: train_both_ways(folders[family], targets, out / name, dense=dense)
        for name, (targets, family, dense) in TRAINED.items()
    }


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer_trains_what_qlora_gives(ranks: int, folders: dict[str, Path], tmp_path: Path) -> None:
    by_rank = [train_all(folders, tmp_path)] if ranks == 1 else run_ranks(train_all, ranks, folders, tmp_path)
    for found in by_rank:
        for name, ((losses, kinds), (wanted, wanted_kinds)) in found.items():
            assert losses == wanted, name
            assert len(set(losses)) == 3, "nothing was learned"
            assert kinds == wanted_kinds
    for name in TRAINED:
        ours, wanted = (load_file(tmp_path / name / way / "adapter_model.safetensors") for way in ("ours", "qlora"))
        assert ours.keys() == wanted.keys()
        assert [key for key, value in wanted.items() if not torch.equal(ours[key], value)] == []
        assert [key for key, value in ours.items() if "lora_B" in key and not value.any(dim=1).all()] == []


def test_experts_that_the_configuration_skips_stay_in_16_bits(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for skipped, left in (["model.layers.0", "lm_head"], 2), (["experts"], 4):
        caplog.clear()
        model = bound(folders["qwen3_moe"], **four_bits(torch.uint8, llm_int8_skip_modules=skipped))
        assert len(packed(model)) == 4 - left
        (line,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"layers.0.mlp.experts.down_proj ({left} in all) stay in 16 bits" in line
        assert surgery.fill(model)(IDS).logits.isfinite().all()
        surgery.release(model)


def test_the_block_is_for_itself_and_those_in_it(folders: dict[str, Path]) -> None:
    with surgery.low_memory(experts="fp4"):
        inner = bound(folders["qwen3_moe"], experts=None)
        with surgery.low_memory(experts="nf4"):
            with surgery.low_memory(experts="fp4"):  # like the outermost
                pass
            other = bound(folders["qwen3_moe"], experts=None)
    outside = bound(folders["qwen3_moe"], experts=None)
    assert [{stack.quant_type for m in model.modules() for stack in stacks_of(m).values()} for model in (
        inner, other, outside
    )] == [{"fp4"}, {"nf4"}, set()]  # fmt: skip


def test_a_model_without_experts_is_as_without(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    with filled(folder) as model:
        assert not getattr(model, "is_quantized", False)
        model.half()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "in 8 bits": ("qwen3_moe", {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "Leave out experts="),
    "sizes that may differ": ("qwen3_moe", {"ignore_mismatched_sizes": True}, "Leave out experts="),
    "another forward": ("qwen3_moe", {"experts_implementation": "eager"}, "load it with experts_implementation='grou"),
    "no dispatch": ("llama4_text", {}, "^low_memory.*: Llama4TextExperts holds .* low_memory.. without experts="),
    "no dispatch, in 4 bits": ("llama4_text", four_bits(), "Llama4TextExperts holds its experts as parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, options, said = REFUSED[name]
    sizes: dict[str, Any] = {
        "num_local_experts": 4,
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
    }
    folder = folders[family] if family in folders else save_tiny(tmp_path, family, **sizes)
    with pytest.raises(surgery.ConfigError, match=said), surgery.low_memory(experts="nf4"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def test_a_class_that_chooses_another_forward_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("openai_privacy_filter", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    AutoModelForTokenClassification.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(surgery.ConfigError, match=r"OpenAIPrivacyFilterExperts is computed by .*'eager'.*16bit"):
        bound(tmp_path, kind=AutoModelForTokenClassification)
    model = bound(tmp_path, kind=AutoModelForTokenClassification, experts_implementation="grouped_mm")
    assert len(packed(model)) == 4


def test_other_types_are_refused() -> None:
    with pytest.raises(surgery.ConfigError, match="experts must be 'nf4', 'fp4' or None"):
        surgery.low_memory(experts="int4")  # type: ignore[arg-type]
