"""TRL's own script by torchrun, as it is and under `surgery run`: losses, memory, checkpoints, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints.llama import LlamaShape
from checkpoints.synthetic import SyntheticCheckpoint
from tests.integrations.data import write_data
from trials.cases import SHARDED, sft_arguments, trl_script
from trials.runs import Trial, largest_difference, run, unequal_tensors

# Two runs of two ranks each; most of their time goes into importing transformers and TRL.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

#: 112 MiB in 16 bits: several times what else a process takes between loading and training.
SHAPE = LlamaShape(layers=4, hidden=1024, intermediate=2816, heads=8, kv_heads=4, vocab=16384, tie=True)

STEPS, SAVED = 4, 3


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("model")
    (root / "model").mkdir()
    list(SyntheticCheckpoint(shape=SHAPE, shards=3).write(root / "model", processes=1))
    given = sft_arguments(root / "model", write_data(root / "data"), steps=STEPS)
    return [*given, *SHARDED, "--bnb_4bit_quant_storage", "bfloat16"]


@pytest.fixture(scope="module")
def stock(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return run(trl_script(), arguments, tmp_path_factory.mktemp("stock") / "run", low_memory=False)


@pytest.fixture(scope="module")
def ours(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return run(trl_script(), arguments, tmp_path_factory.mktemp("ours") / "run", low_memory=True)


def test_losses_are_those_of_stock(stock: Trial, ours: Trial) -> None:
    assert [len(losses) for losses in stock.losses] == [STEPS, STEPS]
    assert len(set(stock.losses[0])) == STEPS, "nothing was learned"
    assert largest_difference(stock.losses, ours.losses) <= 1e-6
    assert ours.kinds == stock.kinds


def test_nothing_is_held_when_loaded_and_little_when_training_begins(stock: Trial, ours: Trial) -> None:
    assert min(stock.parameter_bytes) > 50 * 2**20
    assert ours.parameter_bytes == [0, 0]
    taken = [[peak - before for peak, before in zip(one.peaks, one.resident, strict=True)] for one in (stock, ours)]
    assert max(taken[1]) < 0.4 * min(taken[0])


def test_what_is_saved_is_what_stock_saves(stock: Trial, ours: Trial) -> None:
    assert ours.files.keys() == stock.files.keys()
    adapters = [name for name in stock.files if name.endswith("adapter_model.safetensors")]
    assert len(adapters) == 3  # two checkpoints, and the model in the end
    assert [unequal_tensors(stock.out / name, ours.out / name) for name in adapters] == [[], [], []]
    states = [_tensors(one.out / f"checkpoint-{SAVED}" / "optimizer.bin") for one in (stock, ours)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_all_that_patches_touched_is_the_object_that_it_was(ours: Trial) -> None:
    assert ours.left == []


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    states = torch.load(file, weights_only=True)["state"]
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
