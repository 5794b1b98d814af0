"""Saved adapters on ranks: the file's values bit for bit, in every sharding, and training that goes on from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import surgery
from tests.distributed.taking import WAYS, Added, Files, Taken, add, logits, take_all
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WEIGHTS = "adapter_model.safetensors"


ALL = sorted(name for ways in WAYS.values() for name in ways)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("adapters")
    model = save_tiny(root / "model", dtype=torch.float32)
    # Of rank 4, which 3 ranks divide unevenly.
    make_adapter(model, root / "adapter", target_modules="all-linear", modules_to_save=["lm_head"])
    make_adapter(model, root / "plain", target_modules="all-linear")
    make_adapter(model, root / "second", target_modules="all-linear", seed=1)
    make_adapter(model, root / "derived", target_modules=["q_proj"], use_dora=True, trainable_token_indices=[1, 70])
    truncated = shutil.copytree(root / "adapter", root / "truncated")
    (truncated / WEIGHTS).write_bytes((truncated / WEIGHTS).read_bytes()[:-100])
    work = root / "work"
    work.mkdir()
    return Files(
        model=model,
        adapter=root / "adapter",
        plain=root / "plain",
        second=root / "second",
        derived=root / "derived",
        truncated=truncated,
        work=work,
    )


def make_adapter(model: Path, folder: Path, *, seed: int = 0, **options: Any) -> None:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, init_lora_weights=False, **options)
    with surgery.qlora(model, lora=lora, dtype=torch.float32, report=surgery.Report()) as adapted:
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter.add_(0.01) if parameter.requires_grad else None
        surgery.save_adapter(adapted, folder)


@pytest.fixture(scope="module")
def expected(files: Files) -> dict[str, torch.Tensor]:
    """Logits with each adapter as plain PEFT loads it."""
    found = {}
    for name in ("adapter", "plain", "second", "derived"):
        with surgery.qlora(files.model, dtype=torch.float32, report=surgery.Report()) as model:
            found["none"] = logits(model)
            found[name] = logits(PeftModel.from_pretrained(model, getattr(files, name)).eval())
    return found


@pytest.fixture(scope="module")
def taken(files: Files) -> dict[str, list[Taken]]:
    """By way, of each rank."""
    found = {world_size: run_ranks(take_all, world_size, files) for world_size in WAYS}
    return {name: [rank[name] for rank in found[world_size]] for world_size, ways in WAYS.items() for name in ways}


@pytest.fixture(scope="module")
def added(files: Files) -> list[Added]:
    return run_ranks(add, 2, files)


@pytest.mark.parametrize("name", ALL)
def test_what_was_loaded_is_the_file(taken: dict[str, list[Taken]], files: Files, name: str) -> None:
    file, found = load_file(files.adapter / WEIGHTS), taken[name][0]
    for state in (found.begun, found.in_place):
        assert state.keys() == file.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in file.items())
    assert not any(rank.moved for rank in taken[name])


@pytest.mark.parametrize("name", ALL)
def test_it_computes_as_plain_peft(taken: dict[str, list[Taken]], expected: dict[str, torch.Tensor], name: str) -> None:
    for rank in taken[name]:
        for found in rank.logits:
            torch.testing.assert_close(found, expected["adapter"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_training_goes_on_as_if_it_had_never_stopped(taken: dict[str, list[Taken]], files: Files, name: str) -> None:
    file, found = load_file(files.adapter / WEIGHTS), taken[name][0]
    # DDP sums in other buckets from its second step on.
    exact = {"rtol": 0.0, "atol": 1e-6 if name == "DDP" else 0.0}
    for key, tensor in found.straight.items():
        torch.testing.assert_close(found.resumed[key], tensor, **exact)
    assert all(not torch.equal(found.resumed[key], tensor) for key, tensor in file.items())


@pytest.mark.parametrize("name", ALL)
def test_each_rank_reads_what_it_keeps(taken: dict[str, list[Taken]], files: Files, name: str) -> None:
    whole = sum(tensor.nbytes for tensor in load_file(files.adapter / WEIGHTS).values())
    copies = 1 if name.startswith("FSDP") else len(taken[name])
    assert sum(rank.nbytes for rank in taken[name]) == copies * whole


@pytest.mark.parametrize("name", ALL)
def test_one_ranks_failure_is_every_ranks(taken: dict[str, list[Taken]], name: str) -> None:
    for number, rank in enumerate(taken[name]):
        start = "CheckpointError" if number == 1 else "PeerError: rank 1 failed: CheckpointError"
        assert rank.refused["truncated on rank 1"].startswith(start)
        assert "the ranks differ in adapter" in rank.refused["another on rank 1"]


def test_what_a_sharding_cannot_add_is_refused(taken: dict[str, list[Taken]], added: list[Added]) -> None:
    for rank in taken["FSDP1"]:
        assert "FSDP1 flattens the parameters" in rank.refused["a second one"]
    for rank in taken["DDP"]:
        assert "DDP averages the gradients" in rank.refused["a second one"]
    for each in added:
        assert "modules_to_save is made from weights" in each.refused["modules_to_save"]


def test_adapters_are_added_and_switched(added: list[Added], expected: dict[str, torch.Tensor], files: Files) -> None:
    names = {"plain again": "plain", "plain under DDP": "plain", "disabled": "none"}
    for rank in added:
        for what, found in rank.logits.items():
            torch.testing.assert_close(found, expected[names.get(what, what)], rtol=1e-5, atol=1e-6, msg=what)
    states = added[0].states
    plain, derived = (load_file(each / WEIGHTS) for each in (files.plain, files.derived))
    wanted = {
        "plain": plain,
        "plain in bfloat16": {key: tensor.bfloat16() for key, tensor in plain.items()},
        "derived": derived,
        "derived, filled": derived,
    }
    for what, state in wanted.items():
        assert states[what].keys() == state.keys()
        assert all(torch.equal(states[what][key], tensor) for key, tensor in state.items()), what


def test_an_added_adapter_trains_as_one_from_the_beginning(added: list[Added]) -> None:
    for key, tensor in added[0].states["second, begun from"].items():
        torch.testing.assert_close(added[0].states["second, trained"][key], tensor, rtol=0, atol=1e-6)
