"""What a rank keeps of a mixture of experts in 4 bits: its share of weights and statistics, as a plan says."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig

import surgery
from surgery.planning.inventory import fixed_bytes, row_bytes
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

#: A number of experts that no number of ranks here divides, and the names that a family has for the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 7, "moe_intermediate_size": 192},
    "gpt_oss": {"num_local_experts": 7, "intermediate_size": 192},
}
SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 32, "num_experts_per_tok": 2}

QUANTS = {
    "statistics of experts sharded": surgery.Quant(),
    "of all layers": surgery.Quant(shard_statistics=True, double_quant=False),
}


class Resident(NamedTuple):
    """Bytes of storages on one rank: of all tensors that loading leaves behind, and of the experts among them."""

    everything: int
    experts: int


def options() -> dict[str, Any]:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"lora": lora, "shard": surgery.FSDP2()}


def storages() -> dict[int, int]:
    """The bytes of every storage that there is, whoever holds it."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    local = [getattr(each, "_local_tensor", each) for each in found]
    return {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in local if not each.is_meta}


def measure(folders: dict[str, Path]) -> dict[tuple[str, str], Resident]:
    """Load each of `folders` with each of `QUANTS`, as all ranks do; one first for what a process makes but once."""
    family = next(iter(folders))
    found = {}
    for case in [(family, next(iter(QUANTS))), *((family, name) for family in folders for name in QUANTS)]:
        found[case] = measure_one(folders[case[0]], QUANTS[case[1]])
    return found


def measure_one(folder: Path, quant: surgery.Quant) -> Resident:
    before = storages()
    with surgery.qlora(folder, quant=quant, report=surgery.Report(), **options()) as model:
        new = {key: nbytes for key, nbytes in storages().items() if key not in before}
        packed = [p for fqn, p in model.named_parameters() if ".experts." in fqn and p.shape[1:] == (1,)]
        assert len(packed) == 2 * 2 * 2, "two layers of two stacks, with statistics"
        experts = {p._local_tensor.untyped_storage()._cdata for p in packed}
        return Resident(sum(new.values()), sum(new[key] for key in experts))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("world", [3])
def test_a_rank_keeps_its_share_and_the_plan_says_so(world: int, tmp_path: Path) -> None:
    folders = {family: save_tiny(tmp_path / family, family, **SIZES, **own) for family, own in FAMILIES.items()}
    by_rank = run_ranks(measure, world, folders)
    for family, name in by_rank[0]:
        folder, quant = folders[family], QUANTS[name]
        plan = surgery.plan(folder, world_size=world, quant=quant, device="cpu", training=None, **options())
        assert plan.experts is not None
        stacks = {target.fqn for target in plan.inventory.experts}
        rows = sum(row_bytes(t) for t in plan.inventory.targets if t.fqn in stacks or t.statistics_of in stacks)
        share = (plan.experts.packed + plan.experts.statistics) / world + rows  # each rounded up to whole rows
        planned = plan.of_rank(0).load.host_held - fixed_bytes(plan.inventory, plan.setting)
        for found in (of_rank[family, name] for of_rank in by_rank):
            assert found.experts <= share
            assert found.everything <= share + rest(folder, quant)
            assert found.everything == pytest.approx(planned, rel=0.05)


def rest(folder: Path, quant: surgery.Quant) -> int:
    """Bytes of all but the experts, whole."""
    lora = options()["lora"]
    plan = surgery.plan(folder, world_size=1, quant=quant, device="cpu", training=None, lora=lora)
    assert plan.experts is not None
    held = plan.of_rank(0).load.host_held - fixed_bytes(plan.inventory, plan.setting)
    return held - plan.experts.packed - plan.experts.statistics
