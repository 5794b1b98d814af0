"""Adapters are rank 0's on every rank, upstream's at the same seed, and train as in one process, in every placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from surgery.config import DDP, FSDP1, FSDP2
from tests.distributed.adapting import LORAS, READING, SEED, Adapted, adapt, adapt_all, lora_of
from tests.distributed.loads import Setup
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

WAYS = {
    "sharded": (2, Setup(placement="sharded", shard=FSDP2())),
    "sharded-uneven": (3, Setup(placement="sharded", shard=FSDP2())),
    "hybrid": (4, Setup(placement="sharded", shard=FSDP2(mesh=(2, 2)))),
    "rank0-cpu": (2, Setup(placement="rank0-cpu", shard=FSDP1())),
    "replicated-fsdp1": (2, Setup(placement="replicated", shard=FSDP1())),
    "replicated-fsdp2": (2, Setup(placement="replicated", shard=FSDP2())),
    "ddp": (2, Setup(placement="replicated", shard=DDP())),
    "unsynchronized": (2, Setup(placement="replicated", shard=FSDP1(sync_module_states=False))),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"), dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Adapted]:
    """Each adapter in one process, at rank 0's seed: its base is whole before PEFT looks at it."""
    setup = Setup(placement="replicated", shard=None)
    return {name: adapt(checkpoint, name, setup) for name in LORAS}


@pytest.fixture(scope="module", params=WAYS)
def by_rank(request: pytest.FixtureRequest, checkpoint: Path) -> list[dict[str, Adapted]]:
    world_size, setup = WAYS[request.param]
    names = [name for name in LORAS if name not in READING or not isinstance(setup.shard, FSDP1)]
    return run_ranks(adapt_all, world_size, checkpoint, names, setup)


def stock_adapter(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """What PEFT alone makes of the unquantized model: its trainable parameters."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(SEED)
    adapted = get_peft_model(model, lora_of(name), autocast_adapter_dtype=False)
    return {name: parameter.detach() for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", LORAS)
def test_one_process_has_the_values_of_upstream(checkpoint: Path, alone: dict[str, Adapted], name: str) -> None:
    expected = stock_adapter(checkpoint, name)
    assert alone[name].trainable == expected.keys()
    for fqn, value in expected.items():
        if "lora_magnitude" not in fqn:  # those are of quantized weights
            assert torch.equal(alone[name].before[fqn], value), fqn


@pytest.mark.parametrize("name", LORAS)
def test_every_rank_has_the_values_of_rank_0(
    by_rank: list[dict[str, Adapted]], alone: dict[str, Adapted], name: str
) -> None:
    expected = alone[name]
    for found in (rank[name] for rank in by_rank if name in rank):
        assert found.trainable == expected.trainable
        assert found.before.keys() == expected.before.keys()
        for fqn, value in expected.before.items():
            if "lora_magnitude" in fqn:  # of rows that ranks have parts of, whose squares are added in another order
                assert torch.allclose(found.before[fqn], value, rtol=1e-6), fqn
            else:
                assert torch.equal(found.before[fqn].view(torch.uint8), value.view(torch.uint8)), fqn


@pytest.mark.parametrize("name", LORAS)
def test_training_is_that_of_one_process(
    by_rank: list[dict[str, Adapted]], alone: dict[str, Adapted], name: str
) -> None:
    expected = alone[name]
    for found in (rank[name] for rank in by_rank if name in rank):
        for fqn in expected.trainable:
            moved = expected.after[fqn] - expected.before[fqn]
            error = (found.after[fqn] - found.before[fqn] - moved).norm() / moved.norm()
            assert moved.norm() > 0, f"{fqn} was not trained"
            # Norms of columns differ in the last digit, and DoRA multiplies by their quotient less one.
            assert error < (1e-3 if name == "dora" else 1e-4), f"{fqn}: {error:.1e} of what it has moved by"
        for fqn in expected.after.keys() - expected.trainable:
            assert torch.equal(found.after[fqn].view(torch.uint8), found.before[fqn].view(torch.uint8)), fqn


def test_the_generators_of_other_ranks_stay_where_they_were(by_rank: list[dict[str, Adapted]]) -> None:
    """Rank 0's own goes on, as it does where PEFT is called alone."""
    for name in by_rank[0]:
        assert [rank[name].is_rng_untouched for rank in by_rank] == [False, *[True] * (len(by_rank) - 1)]
