"""Patches of 4-bit layers under real FSDP: gloo, CPU, one rank and two.

Rank 0 holds the packed weight on the CPU, the others on meta; every rank holds the quant_state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import patches
from tests.helpers.ranks import RanksFailedError, run_ranks

from .four_bit import dequantized, on_meta, quantized, unchanged

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

CPU = torch.device("cpu")
SHAPE = "bitsandbytes.linear4bit-shape"
NO_REWRAP = "bitsandbytes.no-rewrap"
SYNC = "torch.fsdp1-sync-on-cpu"
STRATEGIES = [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]


class Adapted(nn.Module):
    """A frozen 4-bit layer with a trainable one beside it. The shards of two ranks end in the middle of a
    block."""

    def __init__(self) -> None:
        super().__init__()
        self.base = quantized(72, 34)
        torch.manual_seed(1)
        self.adapter = nn.Linear(72, 34)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(x)


class Watch:
    """What `layer.weight` was in each forward of the layer."""

    def __init__(self, layer: Linear4bit) -> None:
        self.seen: list[tuple[type, bool]] = []
        layer.register_forward_pre_hook(self._look)

    def _look(self, layer: Linear4bit, args: object) -> None:
        weight = layer.weight
        self.seen.append((type(weight), getattr(weight, "quant_state", None) is layer.quant_state))


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """Losses; the same batch on every rank, so that they equal those of one process."""
    torch.manual_seed(2)
    x, y = torch.randn(4, 72), torch.randn(4, 34)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(model: Adapted, *, use_orig_params: bool, strategy: ShardingStrategy) -> FullyShardedDataParallel:
    """One unit with `use_orig_params`, which allows frozen beside trainable; otherwise a unit for each
    layer."""
    if dist.get_rank() > 0:
        on_meta(model.base)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=strategy,
        use_orig_params=use_orig_params,
        auto_wrap_policy=None if use_orig_params else ModuleWrapPolicy({Linear4bit, nn.Linear}),
        sync_module_states=True,
        device_id=CPU,
        param_init_fn=lambda module: module.to_empty(device=CPU, recurse=False),
    )


@contextlib.contextmanager
def with_patches(*items: Any) -> Iterator[None]:
    with unchanged(Linear4bit), patches.transaction(*items, reason="test"):
        yield


def fsdp1_reads(use_orig_params: bool, strategy: ShardingStrategy) -> None:
    reference = Adapted()
    expected, logical, keys = train(reference), dequantized(reference.base), set(reference.state_dict())
    model = Adapted()
    base = model.base
    with with_patches(patches.on(SHAPE, [base]), SYNC):
        wrapped = sharded(model, use_orig_params=use_orig_params, strategy=strategy)
        before, watch = len(list(wrapped.parameters())), Watch(base)
        assert train(wrapped) == pytest.approx(expected, rel=1e-6)
        assert watch.seen == [(Params4bit, True)] * 3
        assert len(list(wrapped.parameters())) == before
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            assert torch.equal(dequantize_bnb_weight(base.weight), logical)
        assert keys <= {key.replace("_fsdp_wrapped_module.", "") for key in wrapped.state_dict()}
        train(wrapped, steps=1)


def fsdp1_reads_between_forwards(strategy: ShardingStrategy) -> None:
    """With `use_orig_params=True` FSDP compares what `layer.weight` gives with what it put there."""
    model = Adapted()
    with with_patches(patches.on(SHAPE, [model.base]), SYNC):
        wrapped = sharded(model, use_orig_params=True, strategy=strategy)
        for _ in range(2):
            train(wrapped, steps=1)
            assert model.base.weight is model.base._parameters["weight"]


def fsdp1_without_rewrap(strategy: ShardingStrategy, item: Any) -> None:
    """Plain Parameters flattened, so that forward finds a weight without its quant_state."""
    reference = Adapted()
    expected = train(reference)
    model = Adapted()
    stored = model.base.weight
    model.base.weight = nn.Parameter(stored.data, requires_grad=False)
    items = [SYNC] if item is None else [SYNC, patches.on(item, [model.base])]
    with with_patches(*items):
        wrapped = FullyShardedDataParallel(model, sharding_strategy=strategy, use_orig_params=True, device_id=CPU)
        before = len(list(wrapped.parameters()))
        assert train(wrapped) == pytest.approx(expected, rel=1e-6)
        assert len(list(wrapped.parameters())) == before


def fsdp2_reads(storage: torch.dtype) -> None:
    reference = Adapted()
    reference.base = quantized(72, 34, storage=storage)
    expected, logical = train(reference), dequantized(reference.base)
    model = Adapted()
    model.base = base = quantized(72, 34, storage=storage)
    with with_patches(patches.on(SHAPE, [base])):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(base, mesh=mesh)
        fully_shard(model, mesh=mesh)
        watch = Watch(base)
        assert isinstance(base.weight, DTensor)
        losses = train(model)
        assert watch.seen == [(Params4bit, True)] * 3
        assert losses == pytest.approx(expected, rel=1e-6)
        base.unshard()  # type: ignore[operator]  # fully_shard makes it an FSDPModule
        assert torch.equal(dequantize_bnb_weight(base.weight), logical)
        base.reshard()  # type: ignore[operator]
        assert isinstance(base.weight, DTensor)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_reads_params4bit_and_trains_exactly(
    world_size: int, strategy: ShardingStrategy, use_orig_params: bool
) -> None:
    run_ranks(fsdp1_reads, world_size, use_orig_params, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fsdp1_finds_the_tensors_that_it_put_there(strategy: ShardingStrategy) -> None:
    run_ranks(fsdp1_reads_between_forwards, 2, strategy)


def test_stock_fsdp1_refuses_the_parameter_that_forward_registers() -> None:
    with pytest.raises(RanksFailedError, match="changing the parameters between forward and backward"):
        run_ranks(fsdp1_without_rewrap, 2, ShardingStrategy.SHARD_GRAD_OP, None)


@pytest.mark.parametrize("item", [NO_REWRAP, SHAPE])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fsdp1_trains_where_forward_replaces_nothing(strategy: ShardingStrategy, item: str) -> None:
    run_ranks(fsdp1_without_rewrap, 2, strategy, item)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world_size", [1, 2])
def test_fsdp2_reads_params4bit_when_unsharded_and_dtensor_when_sharded(world_size: int, storage: torch.dtype) -> None:
    run_ranks(fsdp2_reads, world_size, storage)
