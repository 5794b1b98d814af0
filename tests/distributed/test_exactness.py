"""Sharded training equals upstream's single process: bits of the base model, losses and gradients of the adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.exactness import Case, Result, run_cases, stock, train
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

#: Dimensions that neither two nor three ranks divide: heads of 14, an inner size of 102.
ODD = {"hidden_size": 56, "intermediate_size": 102, "head_dim": 14, "vocab_size": 97}

MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {"attention_bias": True}),
    "odd": ("llama", ODD),
}

CASES = [
    Case(name="plain"),
    Case(name="fp4", quant={"quant_type": "fp4"}),
    Case(name="single-quant", quant={"double_quant": False}),
    Case(name="blocksize-128", quant={"blocksize": 128}),
    Case(name="fp4-single-128", quant={"quant_type": "fp4", "double_quant": False, "blocksize": 128}),
    Case(name="storage-bf16", quant={"quant_storage": torch.bfloat16}),
    Case(name="storage-fp16", quant={"quant_storage": torch.float16}),
    Case(name="biased", model="biased"),
    Case(name="biased-storage-bf16", model="biased", quant={"quant_storage": torch.bfloat16}),
    Case(name="tied", model="tied"),
    Case(name="odd", model="odd"),
    Case(name="odd-storage-bf16", model="odd", quant={"quant_storage": torch.bfloat16}),
    Case(name="orig-params", shard={"use_orig_params": True}),
    Case(name="orig-params-storage-bf16", quant={"quant_storage": torch.bfloat16}, shard={"use_orig_params": True}),
    Case(name="tied-orig-params", model="tied", shard={"use_orig_params": True}),
    Case(name="block-units", shard={"use_orig_params": True, "units": "block"}),
    Case(name="shard-grad-op", shard={"strategy": "shard-grad-op"}),
    Case(name="shard-grad-op-orig-params", shard={"strategy": "shard-grad-op", "use_orig_params": True}),
    Case(name="no-shard", shard={"strategy": "no-shard"}),
    Case(name="no-shard-orig-params", shard={"strategy": "no-shard", "use_orig_params": True}),
    Case(name="checkpointing", checkpointing="non-reentrant"),
    Case(name="checkpointing-orig-params", checkpointing="non-reentrant", shard={"use_orig_params": True}),
    Case(name="checkpointing-reentrant", checkpointing="reentrant"),
    Case(name="replicated", placement="replicated"),
]

HYBRID = [
    Case(name="hybrid", shard={"strategy": "hybrid-shard", "mesh": (2, 2)}),
    Case(name="hybrid-orig-params", shard={"strategy": "hybrid-shard", "mesh": (2, 2), "use_orig_params": True}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_tiny(root / name, kind, **changes) for name, (kind, changes) in MODELS.items()}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Result]:
    return {case.name: train(stock(checkpoints[case.model], case)) for case in [*CASES, *HYBRID]}


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints: dict[str, Path]) -> list[dict[str, Result]]:
    return run_ranks(run_cases, 2, checkpoints, CASES)


@pytest.fixture(scope="module")
def on_three_ranks(checkpoints: dict[str, Path]) -> list[dict[str, Result]]:
    return run_ranks(run_cases, 3, checkpoints, CASES)


@pytest.fixture(scope="module")
def on_a_mesh_of_four(checkpoints: dict[str, Path]) -> list[dict[str, Result]]:
    return run_ranks(run_cases, 4, checkpoints, HYBRID)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_stock_process(
    case: Case, expected: dict[str, Result], on_two_ranks: list[dict[str, Result]]
) -> None:
    for found in on_two_ranks:
        assert_equal(found[case.name], expected[case.name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_ranks_equal_one_stock_process(
    case: Case, expected: dict[str, Result], on_three_ranks: list[dict[str, Result]]
) -> None:
    for found in on_three_ranks:
        assert_equal(found[case.name], expected[case.name])


@pytest.mark.parametrize("case", HYBRID, ids=lambda case: case.name)
def test_hybrid_mesh_equals_one_stock_process(
    case: Case, expected: dict[str, Result], on_a_mesh_of_four: list[dict[str, Result]]
) -> None:
    for found in on_a_mesh_of_four:
        assert_equal(found[case.name], expected[case.name])


def assert_equal(found: Result, expected: Result) -> None:
    """Bits of the base model exactly; losses and gradients within 1e-5 relative."""
    assert found.packed.keys() == expected.packed.keys() and len(found.packed) == 14
    for name, packed in expected.packed.items():
        assert torch.equal(found.packed[name], packed), f"packed bytes of {name}"
        assert_same_quant_state(found.quant_states[name], expected.quant_states[name], name)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0)
    assert expected.losses[-1] != expected.losses[0]
    for got, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert got.keys() == wanted.keys() and len(got) == 28
        for name, gradient in wanted.items():
            error = (got[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"gradient of {name}: relative error {error:.2e}"


def assert_same_quant_state(found: dict[str, object], expected: dict[str, object], name: str) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), f"{key} of {name}"  # type: ignore[arg-type]
        else:
            assert found[key] == value, f"{key} of {name}"
