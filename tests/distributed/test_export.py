"""Exports of sharded models: the same files on any number of ranks, equal to those of `surgery merge` and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import surgery
from surgery.config import DDP, FSDP1, FSDP2, Quant
from surgery.errors import ConfigError
from surgery.writing.merge import merge
from surgery.writing.quantize import quantize
from tests.distributed.exporting import IDS, Case, Done, built, export_all, fail_and_go_on
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BOTH = ("merged", "merged-nf4")
ALONE = {
    "linear": Case(),
    "dora": Case(adapter="dora", forms=BOTH),
    "saved": Case(adapter="saved", forms=("merged",)),
    "conv1d": Case(base="gpt2", adapter="conv1d", forms=(*BOTH, "base")),
    "experts": Case(base="moe", adapter="experts", forms=BOTH),
    "embedding": Case(adapter="embedding", quant=None, forms=("merged", "merged-nf4", "base")),
}
WORLDS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "linear": {"shard": FSDP1()},
        "dora": {"shard": FSDP1(use_orig_params=True), "placement": "replicated"},
        "conv1d": {"shard": FSDP2()},
        "embedding": {"shard": FSDP2()},
    },
    3: {
        "linear": {"shard": FSDP2()},
        "saved": {"shard": FSDP1(use_orig_params=True)},
        "experts": {"shard": FSDP2()},
        "conv1d": {"shard": DDP()},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all checkpoints; in it what one process exports, in `alone`, and what ranks do, in their number."""
    folder = tmp_path_factory.mktemp("export")
    for name, kind, changes in (("llama", "llama", {}), ("gpt2", "gpt2", {}), ("moe", "qwen3_moe", MOE)):
        save_tiny(folder / name, kind, **changes)
        quantize(folder / name, folder / f"{name}-packed")
    (folder / "llama" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Done]:
    """What one process makes of every case."""
    return export_all(folder, folder / "alone", ALONE)


@pytest.mark.parametrize("world_size", WORLDS)
def test_any_number_of_ranks_writes_the_same_files_and_trains_on(
    folder: Path, alone: dict[str, Done], world_size: int
) -> None:
    cases = {name: replace(ALONE[name], **sharing) for name, sharing in WORLDS[world_size].items()}
    for done in run_ranks(export_all, world_size, folder, folder / str(world_size), cases):
        for name, found in done.items():
            assert found.files == alone[name].files, name
            assert found.losses[0] == found.losses[1], "the model is what it was"


def test_where_one_rank_fails_all_do_and_can_go_on(folder: Path, alone: dict[str, Done]) -> None:
    by_rank = run_ranks(fail_and_go_on, 3, folder, folder / "failing", Case(shard=FSDP1()))
    for rank, failed in enumerate(by_rank):
        full, there, not_finite = failed.errors
        if rank == 2:
            assert full.startswith("ExportError: ")
            assert "File too large" in full
            assert "run the same again to go on" in full
        else:
            assert full.startswith("PeerError: rank 2 failed: ExportError")
        assert "it is there, and" in there
        assert "layers.0.self_attn.q_proj.weight: expected finite numbers, found" in not_finite
        assert failed.files == alone["linear"].files["merged"]
        assert failed.losses[0] == failed.losses[1]
    assert not (folder / "failing" / "poisoned").exists()


@pytest.mark.parametrize("name", ALONE)
def test_an_export_is_what_merging_the_saved_adapter_gives(folder: Path, alone: dict[str, Done], name: str) -> None:
    case, exported = ALONE[name], folder / "alone" / name
    base = folder / (case.base if case.quant is None else f"{case.base}-packed")
    for form, quant in (("merged", None), ("merged-nf4", Quant())):
        if form in case.forms:
            merge(base, exported / "adapter", folder / f"{name}-{form}", quant=quant)
            same_tensors(exported / form, folder / f"{name}-{form}")
    model: Any = AutoModelForCausalLM.from_pretrained(exported / "merged")
    torch.testing.assert_close(model(input_ids=IDS).logits.float(), alone[name].logits, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_a_base_that_is_packed_is_what_quantizing_the_checkpoint_gives(folder: Path, alone: Any, name: str) -> None:
    for file in ("model.safetensors", "config.json"):
        exported = folder / "alone" / name / "base" / file
        assert exported.read_bytes() == (folder / f"{ALONE[name].base}-packed" / file).read_bytes()


def test_a_base_in_16_bits_is_as_it_was_and_merged_as_peft_does(folder: Path, alone: dict[str, Done]) -> None:
    exported = folder / "alone" / "embedding"
    same_tensors(exported / "base", folder / "llama")
    stock: Any = AutoModelForCausalLM.from_pretrained(folder / "llama")
    state = PeftModel.from_pretrained(stock, exported / "adapter").merge_and_unload().state_dict()
    found = load(exported / "merged")
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} < set(
        alone["embedding"].files["merged"]
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_embedding_and_a_head_that_adapters_tear_apart_are_two(folder: Path) -> None:
    save_tiny(folder / "tied", tie_word_embeddings=True)
    with built(folder, Case(base="tied", adapter="embedding", quant=None)) as model:
        logits = model(input_ids=IDS).logits.float()
        surgery.export(model, folder / "untied")
        surgery.export(model, folder / "still-tied", merged=False)
    with built(folder, Case(base="tied", adapter="tokens", quant=None)) as model:
        surgery.export(model, folder / "alike")  # both have the same trained tokens
        surgery.save_adapter(model, folder / "tokens")
    merge(folder / "tied", folder / "tokens", folder / "alike-merged")
    same_tensors(folder / "alike", folder / "alike-merged")
    assert "lm_head.weight" not in load(folder / "alike")
    found: Any = AutoModelForCausalLM.from_pretrained(folder / "untied")
    assert not found.config.tie_word_embeddings
    torch.testing.assert_close(found(input_ids=IDS).logits.float(), logits, atol=0.05, rtol=0)
    assert "lm_head.weight" not in load(folder / "still-tied")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    def refused(model: nn.Module, words: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            surgery.export(model, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    refused(nn.Linear(2, 2), "whose checkpoint is not known")
    with built(folder, ALONE["linear"]) as model:
        refused(model, "float32, bfloat16 or float16, found torch.int8", dtype=torch.int8)
        refused(model, "nf4 or fp4; found 'int8'", dtype="int8")
        refused(model, "written as uint8", dtype=Quant(quant_storage=torch.bfloat16))
        with pytest.raises(ConfigError, match="the folder that is read"):
            surgery.export(model, folder / "llama", overwrite=True)


def load(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def same_tensors(one: Path, other: Path) -> None:
    """Require the same names, dtypes, shapes and values."""
    found, expected = load(one), load(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
