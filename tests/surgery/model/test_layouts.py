"""Checkpoints as they are found: each gives the model that stock transformers loads, or is refused as incomplete.

What stock ignores is ignored and counted; `surgery plan` says the same as the loader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import WeightsMismatchError
from surgery.planning.plan import plan
from tests.helpers.damage import edit_config, edit_tensors
from tests.helpers.models import TINY, save_tiny

#: transformers leaves experts in 16 bits.
AS_STOCK = surgery.Quant(experts=False)

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

Tensors = dict[str, torch.Tensor]

TEXT = {**TINY, "head_dim": 16}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    "llama4": {
        "text_config": {**TEXT, "num_local_experts": 4, "intermediate_size_mlp": 112, "interleave_moe_layer_step": 2},
        "vision_config": {
            **VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "gemma3": {"text_config": {**TEXT, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": 14,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
    },
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
SARVAM = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 16,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "sarvam_moe": ("sarvam_moe", SARVAM),
    "lara_mini": ("lara_mini", {"head_dim": 16}),
}

#: Their routers are in float32 whatever the model is.
DTYPES = {"deepseek_v3": torch.float32, "sarvam_moe": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`change(folder)` makes a layout of the checkpoint `base`.

    ignored, initialized: as the report counts them. lacks: what the refusal says, where stock would make something up.
    untied: whether the head is no longer the embedding, though the config ties them.
    """

    name: str
    base: str
    change: Callable[[Path], Any]
    ignored: Mapping[str, int] = field(default_factory=dict)
    initialized: Mapping[str, int] = field(default_factory=dict)
    lacks: str | None = None
    untied: bool = False


def add(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda held: held.update(tensors))


def rename(new: Callable[[str], str]) -> Callable[[Path], None]:
    def change(held: Tensors) -> None:
        renamed = {new(name): tensor for name, tensor in held.items()}
        held.clear()
        held.update(renamed)

    return lambda folder: edit_tensors(folder, change)


def drop(*parts: str) -> Callable[[Path], None]:
    def change(held: Tensors) -> None:
        for name in [name for name in held if any(part in name for part in parts)]:
            del held[name]

    return lambda folder: edit_tensors(folder, change)


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda held: held.update({n: t.to(dtype) for n, t in held.items()}))


def again(name: str, source: str, alter: Callable[[torch.Tensor], Any] = torch.clone) -> Callable[[Path], None]:
    """Store `source` once more, as `name`."""
    return lambda folder: edit_tensors(folder, lambda held: held.update({name: alter(held[source].clone())}))


def but_one(weight: torch.Tensor) -> torch.Tensor:
    weight[5, 7] += 1
    return weight


def list_too(**weight_map: str) -> Callable[[Path], None]:
    """Name more tensors in the index than the files hold."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        first = next(iter(index["weight_map"].values()))
        index["weight_map"] |= {name: file or first for name, file in weight_map.items()}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def repeat_in_another_shard(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    last = folder / max(file for file in weight_map.values() if file != weight_map[NORM])
    first = folder / weight_map[NORM]
    tensors, norm = load_file(last), load_file(first)[NORM]
    save_file({**tensors, NORM: norm + 1}, last)


def single_beside_shards(folder: Path) -> None:
    shutil.copytree(folder, folder / "copy")
    edit_tensors(folder / "copy", lambda held: held.update({NORM: held[NORM] + 1}))
    shutil.move(folder / "copy" / "model.safetensors", folder)
    shutil.rmtree(folder / "copy")


def old_gemma3(name: str) -> str:
    if name.startswith("language_model.model.") or name == HEAD:
        return name
    return name.removeprefix("model.")


def text_config_alone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))


BOTH = range(2)
WITHOUT = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(8) for n in BOTH}
MASKS = {f"transformer.h.{n}.attn.{name}": torch.rand(1, 1, 8, 8) for n in BOTH for name in ("bias", "masked_bias")}
NEOX = {
    f"gpt_neox.layers.{n}.attention.{name}": torch.rand(4)
    for n in BOTH
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
}
LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)

CASES = (
    Case(
        name="rotary frequencies in every layer",
        base="llama",
        change=add(**WITHOUT),
        ignored={"model.layers.*.self_attn.rotary_emb.inv_freq": 2},
    ),
    Case(
        name="rotary frequencies and masks of GPT-NeoX",
        base="gpt_neox",
        change=add(**NEOX),
        ignored={
            "gpt_neox.layers.*.attention.bias": 2,
            "gpt_neox.layers.*.attention.masked_bias": 2,
            "gpt_neox.layers.*.attention.rotary_emb.inv_freq": 2,
        },
    ),
    Case(
        name="masks of GPT-2",
        base="gpt2",
        change=add(**MASKS),
        ignored={"transformer.h.*.attn.bias": 2, "transformer.h.*.attn.masked_bias": 2},
    ),
    Case(
        name="buffers that are no tensors any more, and a step counter",
        base="llama",
        change=add(**{"model.position_ids": torch.arange(8), "global_step": torch.tensor(5)}),
        ignored={"model.position_ids": 1, "global_step": 1},
    ),
    Case(
        name="a bias that the config has not",
        base="llama",
        change=add(**{"model.layers.0.self_attn.q_proj.bias": torch.rand(64)}),
        ignored={"model.layers.0.self_attn.q_proj.bias": 1},
    ),
    Case(
        name="a value head",
        base="llama",
        change=add(**{"v_head.summary.weight": torch.rand(1, 64)}),
        ignored={"v_head.summary.weight": 1},
    ),
    Case(
        name="more layers than the config",
        base="llama",
        change=lambda folder: edit_config(folder, num_hidden_layers=1),
        ignored={f"model.layers.1.{part}.weight": 1 for part in LAYER},
    ),
    Case(
        name="fewer layers than the config",
        base="llama",
        change=lambda folder: edit_config(folder, num_hidden_layers=3),
        lacks="9 parameters no tensor fills",
    ),
    Case(
        name="a layer for prediction of several tokens, in the index alone",
        base="llama",
        change=list_too(**{"mtp.layers.0.weight": "", "mtp.layers.1.weight": ""}),
        ignored={"mtp.layers.*.weight": 2},
    ),
    Case(name="a tied head in the index alone", base="tied", change=list_too(**{HEAD: ""}), ignored={HEAD: 1}),
    Case(
        name="the index names another shard",
        base="llama",
        change=list_too(**{NORM: "", HEAD: ""}),
    ),
    Case(name="a tensor in two shards", base="llama", change=repeat_in_another_shard, ignored={NORM: 1}),
    Case(name="one file beside shards", base="llama", change=single_beside_shards),
    Case(
        name="a shard of something else",
        base="llama",
        change=lambda folder: save_file({NORM: torch.zeros(64)}, folder / "z-other.safetensors"),
    ),
    Case(name="no norm", base="llama", change=drop(NORM), lacks=f"1 parameters no tensor fills: {NORM}"),
    Case(name="saved from the base model", base="tied", change=rename(lambda name: name.removeprefix("model."))),
    Case(
        name="saved from the base model, with no head",
        base="llama",
        change=lambda folder: (drop(HEAD)(folder), rename(lambda name: name.removeprefix("model."))(folder)),
        lacks=f"1 parameters no tensor fills: {HEAD}",
    ),
    Case(
        name="GPT-2 saved from the base model, with a mask",
        base="gpt2",
        change=lambda folder: (
            rename(lambda name: name.removeprefix("transformer."))(folder),
            add(**{"h.0.attn.bias": torch.rand(1, 1, 8, 8)})(folder),
        ),
        ignored={"h.0.attn.bias": 1},
    ),
    Case(
        name="with and without prefix",
        base="llama",
        change=again("norm.weight", NORM, torch.zeros_like),
        ignored={"norm.weight": 1},
    ),
    Case(
        name="another prefix",
        base="llama",
        change=rename(lambda name: f"language_model.{name}"),
        lacks="21 parameters no tensor fills",
    ),
    Case(name="float32", base="llama", change=cast(torch.float32)),
    Case(name="float64", base="gpt2", change=cast(torch.float64)),
    Case(name="float16", base="mixtral", change=cast(torch.float16)),
    Case(name="a tied head that is stored", base="tied", change=again(HEAD, EMBEDDING)),
    Case(name="a tied head stored as float32", base="tied", change=again(HEAD, EMBEDDING, torch.Tensor.float)),
    Case(name="a tied head that differs", base="tied", change=again(HEAD, EMBEDDING, torch.neg), untied=True),
    Case(
        name="a tied head that differs in one value", base="tied", change=again(HEAD, EMBEDDING, but_one), untied=True
    ),
    Case(name="a tied head, no embedding", base="tied", change=rename(lambda n: HEAD if n == EMBEDDING else n)),
    Case(name="neither", base="tied", change=drop(EMBEDDING), lacks=f"1 parameters no tensor fills: {EMBEDDING}"),
    Case(
        name="a tied head of another shape",
        base="tied",
        change=again(HEAD, EMBEDDING, lambda weight: weight[:90].clone()),
        lacks="(90, 64)",
    ),
    Case(name="an expert less", base="mixtral", change=drop("experts.3."), lacks="experts.gate_up_proj"),
    Case(name="a part of an expert less", base="mixtral", change=drop("experts.3.w3"), lacks="cannot be made of 7"),
    Case(name="query, key and value in one", base="sarvam_moe", change=lambda folder: None),
    Case(name="projections of linear attention in one", base="lara_mini", change=lambda folder: None),
    Case(
        name="a buffer that starts at zero",
        base="deepseek_v3",
        change=drop("e_score_correction_bias"),
        initialized={"model.layers.1.mlp.gate.e_score_correction_bias": 1},
    ),
    Case(
        name="a layer that the class does not build",
        base="deepseek_v3",
        change=add(**{"model.layers.61.eh_proj.weight": torch.rand(4, 4)}),
        ignored={"model.layers.61.eh_proj.weight": 1},
    ),
    Case(
        name="the text of Llama 4",
        base="llama4",
        change=lambda folder: None,
        ignored={"vision_model": 41, "multi_modal_projector": 1},
    ),
    Case(
        name="the text of Llama 4, by its own config",
        base="llama4",
        change=text_config_alone,
        ignored={"vision_model": 41, "multi_modal_projector": 1},
    ),
    Case(
        name="Llama 4 without a head", base="llama4", change=drop(HEAD), lacks="1 parameters no tensor fills: lm_head"
    ),
    Case(
        name="the text of Qwen 3.5, and a head for several tokens",
        base="qwen3_5",
        change=add(**{"mtp.fc.weight": torch.rand(4, 4)}),
        ignored={"model.visual": 33, "mtp.fc": 1},
    ),
    Case(name="Gemma 3 whole", base="gemma3", change=lambda folder: None),
    Case(name="Gemma 3 as it was first saved", base="gemma3", change=rename(old_gemma3)),
    Case(
        name="Gemma 3 without a layer for images",
        base="gemma3",
        change=drop(".encoder.layers.1."),
        lacks="16 parameters no tensor fills",
    ),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in shards; that of a vision-language model as `save_pretrained` of all of it writes it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    found = {n: save_tiny(tmp_path_factory.mktemp(n), kind, **changes) for n, (kind, changes) in BASES.items()}
    for kind, parts in VISION_LANGUAGE.items():
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **parts), dtype=torch.bfloat16)
        found[kind] = tmp_path_factory.mktemp(kind)
        whole.save_pretrained(found[kind])
    return found


def stock(folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The model of stock transformers and bitsandbytes, and what it says is missing; or None and what it raises."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    options: dict[str, Any] = {"quantization_config": config, "dtype": dtype, "device_map": {"": "cpu"}}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except RuntimeError as error:
        return None, [str(error)]
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.train(), sorted(info["missing_keys"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 35).view(2, 16), use_cache=False).logits
    return found


def by_prefix(groups: Mapping[str, int], expected: Mapping[str, int]) -> dict[str, int]:
    """`groups`, joined under the names of `expected` that they begin with."""
    found: dict[str, int] = {}
    for name, count in groups.items():
        prefix = next((each for each in expected if name.startswith(f"{each}.") or name == each), name)
        found[prefix] = found.get(prefix, 0) + count
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_layout_is_loaded_as_stock_loads_it_or_refused(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], case: Case
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bases[case.base], folder)
    case.change(folder)
    dtype = DTYPES.get(case.base, torch.bfloat16)
    expected, missing = stock(folder, dtype)
    if case.lacks is not None:
        assert missing
        load = partial(surgery.qlora, folder, quant=AS_STOCK, report=surgery.Report())
        for refused in (load, partial(plan, folder, world_size=1, quant=AS_STOCK)):
            with pytest.raises(WeightsMismatchError) as caught:
                refused()
            assert case.lacks in str(caught.value)
        return
    assert missing == list(case.initialized)
    capsys.readouterr()
    report = surgery.Report(show_progress=True)
    with surgery.qlora(folder, quant=AS_STOCK, dtype=dtype, report=report) as model:
        assert isinstance(model, type(expected))
        assert model.config._name_or_path == str(folder)
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert torch.equal(logits(model), logits(expected))
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]
        assert is_tied == (expected.get_output_embeddings().weight is expected.get_input_embeddings().weight)
        assert not (is_tied and case.untied)
    assert by_prefix(report.ignored, case.ignored) == case.ignored
    assert report.initialized == case.initialized
    said = capsys.readouterr().err
    assert ("ignored as transformers does" in said) == bool(case.ignored)
    assert ("not in the checkpoint" in said) == bool(case.initialized)
    planned = plan(folder, world_size=1, device="cpu").inventory
    assert len(planned.ignored) == sum(report.ignored.values())
    assert len(planned.initialized) == sum(report.initialized.values())
