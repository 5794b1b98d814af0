"""Mixtures of experts of three real sizes on up to 256 ranks, and what a plan says of experts in 4 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from checkpoints.experts import ExpertsShape
from surgery.checkpoint import Checkpoint
from surgery.config import FSDP2, Quant
from surgery.passes.prepare import prepare
from surgery.planning.inventory import take_inventory
from surgery.planning.plan import MemoryPlan, make_plan
from surgery.planning.training import Training
from surgery.quantizers.bnb import Bnb4bit
from surgery.quantizers.experts import Experts4bit
from surgery.telemetry.numbers import say_size
from tests.helpers.hollow import DEEPSEEK_V3, GLM_4_5, QWEN3_235B, write_hollow
from tests.helpers.live import LiveBytes
from tests.helpers.models import save_tiny
from tests.surgery.planning.conftest import setting
from tests.surgery.planning.test_command import run
from tests.surgery.planning.test_scale import calls

WORLDS = (8, 64, 256)
SHAPES: dict[str, ExpertsShape] = {"Qwen3-235B-A22B": QWEN3_235B, "GLM-4.5": GLM_4_5, "DeepSeek-V3": DEEPSEEK_V3}

#: GB of the experts in 16 bits, in 4 bits, and of their statistics; and parameters of the model, in billions.
SIZES = {
    "Qwen3-235B-A22B": (454.2, 113.5, 3.6, 235.1),
    "GLM-4.5": (671.9, 168.0, 5.3, 352.8),
    "DeepSeek-V3": (1307.8, 327.0, 10.4, 671.0),
}

GB = 10**9


@pytest.fixture(scope="module", params=SHAPES)
def plans(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[int, MemoryPlan]]:
    """Of one checkpoint of some 40,000 tensors, whose weights are holes; an inventory is the same for all ranks."""
    folder = write_hollow(tmp_path_factory.mktemp("large"), SHAPES[request.param], shards=90)
    prepared = prepare(Checkpoint.open(folder), setting(world_size=8))
    inventory, training = take_inventory(prepared), Training(checkpointing=True)
    return request.param, {world: make_plan(inventory, setting(world_size=world), training) for world in WORLDS}


def row(name: str, plan: MemoryPlan) -> str:
    """The row of `docs/plan.md` for `plan`: of the ranks that need most."""
    figures = max((figures for _, figures in plan.classes), key=lambda each: each.device_peak)
    assert figures.train is not None
    assert plan.experts is not None
    found = (
        figures.bytes_read,
        figures.load.device_held,
        figures.load.device_peak,
        figures.train.device_peak,
        plan.experts.held_in_16_bits,
        plan.experts.peak_in_16_bits,
    )
    return f"| {name} | {plan.setting.world_size} | {' | '.join(map(say_size, found))} |"


def test_large_models_on_many_ranks(plans: tuple[str, dict[int, MemoryPlan]]) -> None:
    name, by_world = plans
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()
    assert [row(name, plan) for plan in by_world.values() if row(name, plan) not in page] == []
    in_16_bits, packed, statistics, parameters = SIZES[name]
    for world, plan in by_world.items():
        assert plan.inventory.parameters / GB == pytest.approx(parameters, abs=0.06)
        assert plan.read_once_per_node == ()
        experts, figures = plan.experts, plan.of_rank(0)
        assert experts is not None
        assert experts.in_16_bits / GB == pytest.approx(in_16_bits, abs=0.06)
        assert experts.packed / GB == pytest.approx(packed, abs=0.06)
        assert experts.statistics / GB == pytest.approx(statistics, abs=0.06)
        assert figures.train is not None
        # Statistics of experts are divided like them, so that all that is whole is those of the other layers.
        assert figures.train.weights * world == pytest.approx(by_world[8].of_rank(0).train.weights * 8, rel=1e-3)  # type: ignore[union-attr]
        number = SHAPES[name].experts
        in_rows = experts.in_16_bits * -(-number // world) / number  # a row of a stack in 16 bits is an expert
        assert experts.held_in_16_bits - experts.held == pytest.approx(
            in_rows - (experts.packed + experts.statistics) / world, rel=0.01
        )
        # No rank ever has a stack, nor all of its statistics in float32 twice over.
        assert figures.load.host_peak < 8 * GB
    few, many = by_world[8], by_world[256]
    assert calls(lambda: make_plan(many.inventory, many.setting, many.training)) < 1_000_000
    assert calls(lambda: make_plan(few.inventory, few.setting, few.training)) < 1_000_000


def test_statistics_are_divided_and_not_read(tmp_path: Path) -> None:
    """On a grid of replicas as on the ranks of one; bytes read are those of the checkpoint, and a block a tensor."""
    sizes: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "num_experts_per_tok": 2}
    checkpoint = Checkpoint.open(save_tiny(tmp_path, "qwen3_moe", **sizes))
    for quant in (Quant(), Quant(double_quant=False)):
        meshed = setting(world_size=4, shard=FSDP2(mesh=(2, 2)), quant=quant)
        inventory = take_inventory(prepare(checkpoint, meshed))
        plan = make_plan(inventory, meshed, Training())
        stored = sum(target.stored_bytes for target in inventory.targets)
        read = sum(figures.bytes_read * len(ranks.ranks) for ranks, figures in plan.classes)
        assert stored <= read <= stored + 4 * len(inventory.targets) * 2 * 64
        assert plan.experts is not None
        statistics = sum(target.nbytes for target in inventory.targets if target.statistics_of is not None)
        assert plan.experts.statistics == statistics
        assert (
            plan.experts.packed == sum(t.form.numel for t in inventory.targets if "experts" in t.fqn and t.logical) // 2
        )
        of_two = make_plan(inventory, setting(quant=quant), Training())
        assert of_two.of_rank(0).train.weights == plan.of_rank(0).train.weights  # type: ignore[union-attr]


def test_the_command_says_what_16_bits_would_need_and_what_stays_in_them(tmp_path: Path) -> None:
    """An expert of 40 x 60 elements is no whole number of blocks of 64."""
    sizes: dict[str, Any] = {"num_experts": 4, "head_dim": 16, "num_experts_per_tok": 2}
    whole = save_tiny(tmp_path / "whole", "qwen3_moe", moe_intermediate_size=32, **sizes)
    said = run(whole, "--world", 2).stdout
    assert "Experts are in 4 bits: 24.0 KiB, and " in said
    assert "In 16 bits (--experts 16bit) they would be 96.0 KiB: a rank would hold " in said
    found = json.loads(run(whole, "--world", 2, "--json").stdout)["experts"]
    assert found["in_16_bits"] == 4 * found["packed"] == 2 * 2 * 4 * 3 * 32 * 64
    assert 0 < found["held"] < found["held_in_16_bits"]
    assert "Experts are in" not in run(whole, "--world", 2, "--experts", "16bit").stdout
    straddling = save_tiny(tmp_path / "odd", "qwen3_moe", moe_intermediate_size=20, hidden_size=36, **sizes)
    said = run(straddling, "--world", 2).stdout
    assert "4 fused weights of experts stay in 16 bits: blocks of 4 bits would straddle experts" in said
    assert "model.layers.*.mlp.experts.gate_up_proj (2), model.layers.*.mlp.experts.down_proj (2)" in said
    assert "Experts are in 4 bits" not in said
    assert json.loads(run(straddling, "--world", 2, "--json").stdout)["experts"] is None
    assert "stay in 16 bits" not in run(straddling, "--world", 2, "--experts", "16bit").stdout
    report = surgery.Report()
    with pytest.warns(UserWarning, match="4 fused weights of experts stay in 16 bits"):
        surgery.release(surgery.qlora(straddling, report=report))
    assert report.left_out == {f"model.layers.*.mlp.experts.{name}": 2 for name in ("gate_up_proj", "down_proj")}


def test_what_making_statistics_takes_is_planned_by_format() -> None:
    """With double quantization stacks come one after the other, and dense weights together; sharded or not."""
    shapes = [torch.Size(shape) for shape in ((8, 64, 512), (8, 32, 512))]
    for kind, double_quant, sharded in product((Experts4bit, Bnb4bit), (True, False), (True, False)):
        quant = kind(Quant(double_quant=double_quant, shard_statistics=sharded), dtype=torch.bfloat16)
        layers = [nn.Linear(shape[-1], shape[:-1].numel(), device="meta") for shape in shapes]
        logical = shapes if kind is Experts4bit else [layer.weight.shape for layer in layers]
        statistics = [torch.rand(shape.numel() // 64) for shape in shapes]
        with LiveBytes(statistics) as live:
            states = quant.states(statistics, logical, [torch.bfloat16] * 2)
            for layer, state in zip(layers, states, strict=True):
                if kind is Experts4bit or sharded:
                    quant.split_state(layer, "weight", state)
        planned = quant.finishing_bytes([each.numel() for each in statistics])
        assert 0.6 * planned <= live.peak <= 1.01 * planned


def test_an_adapter_of_experts_in_16_bits_keeps_whole_weights(tmp_path: Path) -> None:
    """PEFT adds its product to the stack, which is kept for backward; in split form a copy of the second factor is."""
    checkpoint = Checkpoint.open(save_tiny(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2))
    plan = make_plan(take_inventory(prepare(checkpoint, setting())), setting(), Training())
    assert plan.in_16_bits is not None
    split, folded = (each.inventory.units for each in (plan, plan.in_16_bits))
    stacks = {2 * 112 * 64 * 4, 112 * 64 * 4}
    assert {size for unit in folded for size in unit.folded} == stacks
    assert {size for unit in split for size in unit.folded} == {2 * 112 * 16 * 4, 64 * 16 * 4}
    assert [replace(unit, weights=(), folded=()) for unit in split] == [
        replace(unit, weights=(), folded=()) for unit in folded
    ]
