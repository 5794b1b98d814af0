"""Which conversions only put whole tensors one behind the other, seen on meta, and true of the values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)
from transformers.models.llama import LlamaConfig

from surgery.checkpoint import Checkpoint, Reader
from surgery.model.concatenation import Watched
from surgery.model.keys import Assignment, Logical
from surgery.model.weights import plan_weights
from tests.helpers.models import save_tiny


class Halves(ConversionOps):
    """An operation that nobody has heard of."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: list[str], **_: Any) -> Any:
        (found,) = input_dict.values()
        return {target_patterns[0]: self.change(found[0] if isinstance(found, list) else found)}


GATE, UP, DOWN = "experts.*.gate.weight", "experts.*.up.weight", "experts.*.down.weight"
FUSED = [MergeModulelist(dim=0), Concatenate(dim=1)]
#: What is made of tensors of which shapes, of every expert's or of one source, and whether it is a concatenation.
CASES: dict[str, tuple[list[Any], dict[str, tuple[int, ...]], bool]] = {
    "merged": ([MergeModulelist(dim=0)], {DOWN: (4, 6)}, True),
    "merged and joined": (FUSED, {GATE: (4, 6), UP: (4, 6)}, True),
    "of different sizes": (FUSED, {GATE: (4, 6), UP: (2, 6)}, True),
    "biases": (FUSED, {GATE: (4,), UP: (4,)}, True),
    "one behind the other": ([Concatenate(dim=0)], {"q": (4, 6), "k": (2, 6), "v": (2, 6)}, True),
    "gates before ups": ([MergeModulelist(dim=0), Concatenate(dim=0)], {GATE: (4, 6), UP: (4, 6)}, True),
    "side by side": ([Concatenate(dim=1)], {"q": (4, 6), "k": (4, 6)}, False),
    "merged on the inside": ([MergeModulelist(dim=1)], {DOWN: (4, 6)}, False),
    "joined on the inside": ([MergeModulelist(dim=0), Concatenate(dim=2)], {GATE: (4, 6), UP: (4, 6)}, False),
    "turned": ([Transpose(1, 2)], {"stack": (3, 4, 6)}, False),
    "turned twice": ([Transpose(1, 2), Transpose(1, 2)], {"stack": (3, 4, 6)}, True),
    "not turned, as it fits": ([Transpose(1, 2, check_dims=True)], {"stack": (3, 6, 6)}, True),
    "turned, since it does not fit": ([Transpose(1, 2, check_dims=True)], {"stack": (3, 4, 9)}, False),
    "interleaved": ([Interleave(dim=0)], {"w": (4, 6)}, False),
    "permuted": ([PermuteForRope()], {"q": (8, 6)}, False),
    "permuted, then joined": (
        [PermuteForRope(permute_layer_names=["q"]), Concatenate(dim=0)],
        {"q": (8, 6), "v": (4, 6)},
        False,
    ),
    "swapped halves": ([Halves(lambda t: torch.cat([t[64:], t[:64]]))], {"w": (128, 2)}, False),
    "cut and joined again": ([Halves(lambda t: torch.cat(t.chunk(2)))], {"w": (8, 2)}, False),
    "counted": ([Halves(lambda t: t + 1)], {"w": (4, 2)}, False),
    "changed in place": ([Halves(lambda t: t.clone().mul_(-1))], {"w": (4, 2)}, False),
    "seen through a view": ([Halves(lambda t: [t, t.t().zero_()][0])], {"w": (4, 2)}, False),
    "of its own": ([Halves(torch.zeros_like)], {"w": (4, 2)}, False),
    "cast": ([Halves(lambda t: t.double())], {"w": (4, 2)}, False),
    "empty": ([Concatenate(dim=0)], {"q": (4, 6), "k": (0, 6)}, False),
}


def assignment_of(
    operations: list[Any], shapes: dict[str, tuple[int, ...]], targets: list[str] | None = None
) -> tuple[Assignment, dict[str, torch.Tensor]]:
    """An assignment of 12 experts, or of one source each, and values of them."""
    found = [
        (pattern.replace("*", f"{n}"), pattern) for n in range(12 if "*" in str(shapes) else 1) for pattern in shapes
    ]
    converter = WeightConverter(list(shapes), targets or ["fused"], operations)
    config = LlamaConfig(num_attention_heads=2)
    assignment = Assignment(
        targets=((targets or ["fused"])[0],),
        sources=tuple(name for name, _ in found),
        patterns=tuple(pattern for _, pattern in found),
        converter=converter,
        logical=Logical(config=config, parameters={"fused": torch.empty(3, 6, 6, device="meta")}),
    )
    return assignment, {name: torch.randn(shapes[pattern]) for name, pattern in found}


def watch(assignment: Assignment, values: dict[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """The order that is seen of every target on meta."""
    meta = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    with Watched(meta) as watched:
        converted = assignment.convert(meta)
    return {name: watched.order(tensor) for name, tensor in converted.items()}


@pytest.mark.parametrize("case", CASES)
def test_whole_tensors_one_behind_the_other_are_told_from_all_else(case: str) -> None:
    operations, shapes, expected = CASES[case]
    assignment, values = assignment_of(operations, shapes)
    order = watch(assignment, values)["fused"]
    assert bool(order) is expected
    if expected:
        whole = torch.cat([values[name].flatten() for name in order])
        assert torch.equal(whole, assignment.convert(values)["fused"].flatten())


def test_sources_of_several_dtypes_are_left_to_the_conversion() -> None:
    assignment, values = assignment_of(FUSED, {GATE: (4, 6), UP: (4, 6)})
    mixed = {name: value.bfloat16() if "up" in name else value for name, value in values.items()}
    assert watch(assignment, mixed) == {"fused": ()}
    assert all(watch(assignment, {name: value.half() for name, value in values.items()}).values())


def test_several_targets_have_their_own_sources() -> None:
    operations = [ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)]
    assignment, values = assignment_of(operations, {GATE: (4, 6), UP: (4, 6)}, ["text", "vision"])
    order, made = watch(assignment, values), assignment.convert(values)
    for target in ("text", "vision"):
        assert torch.equal(torch.cat([values[name].flatten() for name in order[target]]), made[target].flatten())
    assert set(order["text"]) | set(order["vision"]) == set(values)
    halves, whole = assignment_of([Chunk(dim=0)], {"qkv": (6, 2)}, ["q", "k"])
    assert set(watch(halves, whole).values()) == {()}


HEAD = {"head_dim": 16}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "olmoe": {"num_experts": 3},
    "qwen3_moe": {"num_experts": 11, **FEW, **HEAD},
    "qwen3_next": {"num_experts": 3, "shared_expert_intermediate_size": 32, **FEW, **HEAD},
    "glm4_moe": {"n_routed_experts": 3, "first_k_dense_replace": 1, **FEW, **HEAD},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **FEW, **LATENT},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_family_are_read_as_transformers_fuses_them(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_tiny(tmp_path, family, **FAMILIES[family])
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    checkpoint = Checkpoint.open(folder)
    plan = plan_weights(model, checkpoint, device=torch.device("cpu"))
    converted = [each for each in plan.assignments if each.converter is not None]
    assert sum("experts" in each.targets[0] for each in converted) >= 2
    with Reader(checkpoint.index) as reader:
        for each in converted:
            for target, order in zip(each.targets, each.orders, strict=True):
                whole = torch.cat([reader.read(name).flatten() for name in order])
                assert torch.equal(whole, expected[target].flatten())
