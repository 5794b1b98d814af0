"""What a plan predicts is what ranks measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from checkpoints.llama import LlamaShape
from checkpoints.synthetic import SyntheticCheckpoint
from surgery.config import FSDP1, FSDP2
from surgery.planning.inventory import HOST_BYTES
from tests.distributed.planned import Case, Loaded, load
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

#: 251 MB in 16 bits. FSDP1's root unit is small: it is wrapped between two looks at the memory.
SHAPE = LlamaShape(layers=8, hidden=1024, intermediate=4096, heads=16, kv_heads=4, vocab=2048)

CASES = {
    "sharded": Case(placement="sharded", shard=FSDP2()),
    "sharded, large adapters": Case(placement="sharded", shard=FSDP2(), r=64),
    "rank0-cpu": Case(placement="rank0-cpu", shard=FSDP1()),
    "replicated": Case(placement="replicated", shard=FSDP2()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("planned")
    list(SyntheticCheckpoint(shape=SHAPE).write(folder, processes=1))
    yield folder
    for file in folder.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folders of three sessions


@pytest.mark.parametrize("name", CASES)
def test_a_plan_predicts_the_peak_of_every_rank_and_what_it_reads(name: str, folder: Path) -> None:
    case = CASES[name]
    plan = surgery.plan(folder, world_size=2, device="cpu", training=None, **case.options())  # type: ignore[arg-type]
    measured: list[Loaded] = run_ranks(load, 2, folder, case)
    planned = [plan.of_rank(rank) for rank in range(2)]
    assert [found.read for found in measured] == [figures.bytes_read for figures in planned]
    # Ranks of tests have imported what a rank imports while it loads.
    peaks = [figures.load.host_peak - HOST_BYTES for figures in planned]
    assert [found.peak for found in measured] == [pytest.approx(peak, rel=0.1) for peak in peaks]
