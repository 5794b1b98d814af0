"""What a rank takes while it loads: one unquantized layer, and the statistics of all."""

from __future__ import annotations

import pytest

from checkpoints.llama import LlamaShape
from checkpoints.synthetic import SyntheticCheckpoint
from memory.measure import LOADING, Measured, measure
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MIB = 1024 * 1024

#: Three weights of 100 MiB: more than the slack of the bound, so that a second one in memory would show.
SHAPE = LlamaShape(layers=1, hidden=2048, intermediate=25600, heads=16, kv_heads=2, vocab=512, tie=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    folder = tmp_path_factory.mktemp("large-layers")
    list(SyntheticCheckpoint(shape=SHAPE).write(folder, processes=1))
    found = run_ranks(measure, 2, "surgery", folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folders of three sessions
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_loading_stays_within_one_layer_and_the_statistics(rank: int, measured: list[Measured]) -> None:
    sizes = measured[rank].sizes
    assert sizes is not None
    assert sizes.largest_layer == 100 * MIB
    assert measured[rank].peak(LOADING) <= sizes.bound(rank)


def test_the_measure_sees_the_layer_and_what_rank_0_keeps(measured: list[Measured]) -> None:
    on_rank0, on_rank1 = measured
    assert on_rank1.sizes is not None
    assert on_rank1.peak(LOADING) >= on_rank1.sizes.largest_layer
    assert on_rank0.peak(LOADING) >= on_rank1.sizes.packed_model
