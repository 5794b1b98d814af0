"""What a rank takes while it loads: what it keeps, a part of a layer, and the statistics of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints.llama import LlamaShape
from checkpoints.synthetic import SyntheticCheckpoint
from memory.measure import OURS, Measured, measure
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MIB = 1024 * 1024
WORLD_SIZE = 2

#: Three weights of 100 MiB: more than the allowance of the bound, so that a second one in memory would show.
SHAPE = LlamaShape(layers=1, hidden=2048, intermediate=25600, heads=16, kv_heads=2, vocab=512, tie=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large-layers")
    list(SyntheticCheckpoint(shape=SHAPE).write(folder, processes=1))
    yield folder
    for file in folder.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folders of three sessions


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, list[Measured]]:
    return {way: run_ranks(measure, WORLD_SIZE, way, folder) for way in OURS}


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize("way", OURS)
def test_loading_stays_within_the_bound(way: str, rank: int, measured: dict[str, list[Measured]]) -> None:
    found = measured[way][rank]
    assert found.sizes is not None
    assert found.sizes.largest_layer == 100 * MIB // (WORLD_SIZE if way == "sharded" else 1)
    assert found.peak <= found.sizes.bound


@pytest.mark.parametrize("way", OURS)
def test_the_measure_sees_what_a_rank_keeps(way: str, measured: dict[str, list[Measured]]) -> None:
    for found in measured[way]:
        assert found.sizes is not None
        assert found.peak >= found.sizes.kept + found.sizes.quant_states


def test_a_rank_keeps_what_its_placement_says(measured: dict[str, list[Measured]]) -> None:
    kept = {way: [found.sizes.kept for found in measured[way] if found.sizes is not None] for way in OURS}
    whole, nothing = kept["rank0-cpu"]
    assert nothing == 0
    assert kept["sharded"] == [whole // 2] * 2
    assert whole > 80 * MIB
