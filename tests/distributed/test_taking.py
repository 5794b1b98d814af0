"""Saved adapters on ranks: the file's values bit for bit, in every sharding, and training that goes on from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import surgery
from tests.distributed.taking import WAYS, Taken, logits, take_all
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"), dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rank 4, which 3 ranks divide unevenly, and with a whole module."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
    with surgery.qlora(checkpoint, lora=lora, dtype=torch.float32, report=surgery.Report()) as model:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        surgery.save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path, adapter: Path) -> torch.Tensor:
    """Logits with the adapter as plain PEFT loads it."""
    with surgery.qlora(checkpoint, dtype=torch.float32, report=surgery.Report()) as model:
        return logits(PeftModel.from_pretrained(model, adapter).eval())


@pytest.fixture(scope="module", params=[2, 3])
def by_rank(
    request: pytest.FixtureRequest, checkpoint: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Taken]]:
    root = tmp_path_factory.mktemp("taken")
    broken = shutil.copytree(adapter, root / "broken")
    (broken / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])
    return run_ranks(take_all, request.param, checkpoint, adapter, broken, root)


@pytest.mark.parametrize("name", WAYS)
def test_what_was_loaded_is_the_file(by_rank: list[dict[str, Taken]], adapter: Path, name: str) -> None:
    file, found = load_file(adapter / WEIGHTS), by_rank[0][name]
    for state in (found.begun, found.in_place):
        assert state.keys() == file.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in file.items())
    assert not any(rank[name].moved for rank in by_rank)


@pytest.mark.parametrize("name", WAYS)
def test_it_computes_as_plain_peft(by_rank: list[dict[str, Taken]], expected: torch.Tensor, name: str) -> None:
    for rank in by_rank:
        for found in rank[name].logits:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WAYS)
def test_training_goes_on_as_if_it_had_never_stopped(by_rank: list[dict[str, Taken]], adapter: Path, name: str) -> None:
    file, found = load_file(adapter / WEIGHTS), by_rank[0][name]
    # DDP sums in other buckets from its second step on.
    exact = {"rtol": 0.0, "atol": 1e-6 if name == "DDP" else 0.0}
    for key, tensor in found.straight.items():
        torch.testing.assert_close(found.resumed[key], tensor, **exact)
    assert all(not torch.equal(found.resumed[key], tensor) for key, tensor in file.items())


@pytest.mark.parametrize("name", WAYS)
def test_each_rank_reads_what_it_keeps(by_rank: list[dict[str, Taken]], adapter: Path, name: str) -> None:
    whole = sum(tensor.nbytes for tensor in load_file(adapter / WEIGHTS).values())
    copies = 1 if name.startswith("FSDP") else len(by_rank)
    assert sum(rank[name].nbytes for rank in by_rank) == copies * whole


@pytest.mark.parametrize("name", WAYS)
def test_one_ranks_failure_is_every_ranks(by_rank: list[dict[str, Taken]], name: str) -> None:
    for number, rank in enumerate(by_rank):
        start = "CheckpointError" if number == 1 else "PeerError: rank 1 failed: CheckpointError"
        assert rank[name].refused["truncated on rank 1"].startswith(start)
        assert "the ranks differ in adapter" in rank[name].refused["another on rank 1"]


def test_what_a_sharding_cannot_add_is_refused(by_rank: list[dict[str, Taken]]) -> None:
    for rank in by_rank:
        assert "FSDP1 flattens the parameters" in rank["FSDP1"].refused["a second one"]
        assert "DDP averages the gradients" in rank["DDP"].refused["a second one"]
