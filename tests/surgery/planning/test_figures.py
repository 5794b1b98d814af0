"""The figures of a plan: what each option changes, and by how much."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from surgery.checkpoint import Checkpoint
from surgery.config import FSDP1, FSDP2, Quant
from surgery.errors import ConfigError
from surgery.passes.loading import Staging
from surgery.passes.prepare import prepare
from surgery.planning.inventory import Inventory, take_inventory, weights_held
from surgery.planning.plan import make_plan
from surgery.planning.ranks import RankPlan, Step
from surgery.planning.training import Training
from surgery.planning.verdict import check_fits, fits_gpu, predictions
from tests.helpers.models import save_tiny
from tests.surgery.planning.conftest import setting

GIB = 1 << 30


def rank0(inventory: Inventory, training: Training | None = None, **changes: object) -> RankPlan:
    return make_plan(inventory, setting(**changes), training or Training()).of_rank(0)


def step(inventory: Inventory, training: Training | None = None, **changes: object) -> Step:
    found = rank0(inventory, training, **changes).train
    assert found is not None
    return found


def test_the_rows_of_a_step_add_up_to_its_peak(inventory: Inventory) -> None:
    for changes in ({}, {"shard": FSDP2(cpu_offload=True)}, {"shard": FSDP1(), "placement": "rank0-cpu"}):
        found = step(inventory, **changes)
        rows = ("weights", "quant_state", "adapters", "gradients", "optimizer")
        rows += ("gathered", "dequantized", "activations", "logits")
        assert sum(getattr(found, row) for row in rows) == found.device_peak + found.on_host


def test_packed_weights_are_halved_by_two_ranks(inventory: Inventory) -> None:
    quantized = sum(t.form.numel for t in inventory.targets if t.is_quantized)
    rest = sum(t.form.numel for t in inventory.targets if not t.is_quantized)
    assert step(inventory).weights == (quantized // 2 + 2 * rest) // 2


def test_adamw_keeps_two_states_and_sgd_none(inventory: Inventory) -> None:
    found = step(inventory)
    assert found.adapters == found.gradients == 2 * inventory.adapter_elements // 2
    assert found.optimizer == 2 * found.adapters
    assert step(inventory, Training(optimizer="sgd")).optimizer == 0


def test_recomputed_activations_take_less(inventory: Inventory) -> None:
    kept, recomputed = step(inventory), step(inventory, Training(checkpointing=True))
    assert recomputed.activations < kept.activations / 5


def test_dora_takes_whole_weights(folder_70b: Path) -> None:
    """In forward an identity as wide as the input, and four matrices; with dropout it keeps one for backward."""
    of = {"target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}

    def found(**options: Any) -> Step:
        lora = LoraConfig(r=16, **of, **options)
        return step(take_inventory(prepare(Checkpoint.open(folder_70b), setting(lora=lora))), lora=lora)

    plain, dora, dropping = found(), found(use_dora=True), found(use_dora=True, lora_dropout=0.1)
    assert dora.dequantized == 28672 * (28672 + 4 * 8192) * 2 > plain.dequantized
    assert dora.adapters - plain.adapters == 80 * 8192 * 2 // 2
    assert dora.activations - plain.activations == 80 * 1024 * 2 * 8192 * 2
    # What is left of each input, and a byte an element that says what that is.
    assert dropping.activations - dora.activations == 80 * 28672 * 8192 * 2 + 80 * 1024 * 28672 * 3


def test_double_quantization_takes_a_quarter_of_the_statistics(inventory: Inventory, folder_70b: Path) -> None:
    single = setting(quant=Quant(double_quant=False))
    taken = take_inventory(prepare(Checkpoint.open(folder_70b), single))
    ratio = step(inventory).quant_state / step(taken, quant=single.quant).quant_state
    assert ratio == pytest.approx(0.25, abs=0.01)


def test_offloaded_shards_are_the_hosts(inventory: Inventory) -> None:
    held = rank0(inventory).load
    offloaded = rank0(inventory, shard=FSDP2(cpu_offload=True)).load
    moved = held.device_held - offloaded.device_held
    assert moved == offloaded.host_held - held.host_held
    assert moved > 16 * GIB


def test_rank0_cpu_keeps_the_model_on_the_host_of_rank_0(inventory: Inventory) -> None:
    plan = make_plan(inventory, setting(shard=FSDP1(), placement="rank0-cpu"), None)
    assert plan.of_rank(0).load.host_peak - plan.of_rank(1).load.host_peak == pytest.approx(33.1 * GIB, rel=0.02)
    assert plan.of_rank(0).load.device_peak < 20 * GIB
    assert [ranks.label for ranks, _ in plan.classes] == ["rank 0", "rank 1"]


def test_replicated_weights_are_whole_on_every_device(inventory: Inventory) -> None:
    whole = make_plan(inventory, setting(shard=None, placement="replicated"), None).of_rank(1)
    assert whole.load.device_held > 1.9 * rank0(inventory).load.device_held


def test_replicas_of_a_mesh_hold_as_much_as_the_ranks_of_one(inventory: Inventory) -> None:
    meshed = rank0(inventory, world_size=4, shard=FSDP2(mesh=(2, 2)))
    assert meshed.load.device_held == rank0(inventory).load.device_held
    assert meshed.bytes_read == pytest.approx(rank0(inventory).bytes_read / 2, rel=1e-3)


def test_on_cpus_everything_is_the_hosts(inventory: Inventory) -> None:
    found = rank0(inventory, device=torch.device("cpu"))
    assert found.load.device_peak == found.device_peak == 0
    assert found.load.host_held > 17 * GIB


def test_pinned_buffers_are_no_anonymous_memory(inventory: Inventory) -> None:
    buffers = Staging.on(torch.device("cuda"))
    found = rank0(inventory).load
    assert found.host_peak - found.anonymous_peak == buffers.buffers * buffers.elements * 2  # of 16-bit weights
    on_cpu = rank0(inventory, device=torch.device("cpu")).load
    assert on_cpu.host_peak == on_cpu.anonymous_peak


def test_predictions_are_the_peaks_of_a_rank(inventory: Inventory) -> None:
    plan = make_plan(inventory, setting(), Training())
    figures = plan.of_rank(1)
    assert figures.train is not None
    assert predictions(plan, 1) == {
        "load": (figures.load.anonymous_peak, figures.load.device_peak),
        "train": (figures.train.host_peak, figures.train.device_peak),
    }
    assert set(predictions(make_plan(inventory, setting(), None), 0)) == {"load"}


def test_a_plan_that_fits_is_not_refused(inventory: Inventory) -> None:
    plan = make_plan(inventory, setting(), Training(checkpointing=True))
    check_fits(plan, 24 * GIB)
    assert fits_gpu(plan, 24 * GIB)


def test_a_plan_that_does_not_fit_is_refused_with_what_would(inventory: Inventory) -> None:
    plan = make_plan(inventory, setting(), Training())
    with pytest.raises(ConfigError, match=r"to train, but 24.0 GiB is free: .*--gradient-checkpointing \("):
        check_fits(plan, 24 * GIB)
    with pytest.raises(ConfigError, match=r"to load, but 10.0 GiB is free: .*--world \d+"):
        check_fits(make_plan(inventory, setting(), None), 10 * GIB)


def test_nothing_helps_where_the_statistics_alone_are_too_large(inventory: Inventory) -> None:
    with pytest.raises(ConfigError, match="nothing that surgery plan knows of"):
        check_fits(make_plan(inventory, setting(), Training()), GIB // 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": FSDP2(mesh=(2, 2))}, "needs 4 ranks"),
        ({"shard": FSDP1()}, "placement sharded"),
        ({"world_size": 0}, "world_size"),
        ({"shard": None, "placement": "rank0-cpu"}, "rank0-cpu"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setting(**changes)
    with pytest.raises(ConfigError, match="seq"):
        dataclasses.replace(Training(), seq=0)


def test_what_upstream_keeps_in_float32_counts_four_bytes_and_is_whole_under_fsdp1(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}
    checkpoint = Checkpoint.open(save_tiny(tmp_path, "glm4_moe", first_k_dense_replace=1, **experts))
    for sharding, share in (({"shard": FSDP1(), "placement": "rank0-cpu"}, 1), ({"shard": FSDP2()}, 2)):
        of_two = setting(lora=None, **sharding)
        taken = take_inventory(prepare(checkpoint, of_two))
        gate = next(target for target in taken.targets if target.fqn.endswith("mlp.gate.weight"))
        assert gate.nbytes == 4 * 64 * 4
        rest = sum(t.nbytes for t in taken.targets if not t.form.is_buffer and t is not gate)
        assert weights_held(taken, of_two) == rest // 2 + gate.nbytes // share
