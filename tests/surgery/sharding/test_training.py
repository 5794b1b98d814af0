"""Several ranks against one process: the same losses, norms and weights on the same global batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._comm_hooks.default_hooks import DefaultState, reduce_scatter_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from loading.step import IGNORED, Micro, take_step
from surgery.sharding.base import strategy_of
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
STEPS = 4
SIZE = 12

#: Unequal lengths and unequal numbers of learnt tokens; the last step is not full.
Sample = tuple[list[int], list[int]]
SAMPLES: list[Sample] = [
    (
        [(index * 7 + position) % 11 for position in range(2 + index % 6)],
        [0, *(int((index + position) % 3 > 0 or position == 0) for position in range(1 + index % 6))],
    )
    for index in range(21)
]


@dataclass
class Output:
    """FSDP finds the tensors of an output in dataclasses, as in those of transformers."""

    logits: torch.Tensor


class TinyLM(nn.Module):
    """Embeds, mixes each position with the mean of those before it, and predicts: causal, and without dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Output:
        hidden = self.embed(input_ids)
        counts = torch.arange(1, hidden.shape[1] + 1).view(1, -1, 1)
        return Output(logits=self.head(hidden + hidden.cumsum(1) / counts))


def collate(samples: list[Sample]) -> Micro:
    """Padded on the right, where no causal model looks."""
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for row, (tokens, learnt) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        wanted = [token if is_learnt else IGNORED for token, is_learnt in zip(tokens[1:], learnt[1:], strict=True)]
        targets[row, : len(wanted)] = torch.tensor(wanted)
    return ids, targets


def share(samples: list[Sample], *, batch_size: int) -> list[Micro]:
    """This rank's micro-batches, as many on every rank: one may have nothing to learn."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = samples[rank::world]
    starts = range(0, -(-len(samples) // world), batch_size)
    return [collate(mine[start : start + batch_size] or [([0, 0], [0, 0])]) for start in starts]


def step_of(model: nn.Module, *, scaler: bool = False, lr: float = 0.5) -> Any:
    """A function of samples and a batch size that takes a step."""
    strategy, optimizer = strategy_of(model, CPU), torch.optim.SGD(model.parameters(), lr=lr)
    loop = {"strategy": strategy, "scaler": strategy.grad_scaler(enabled=scaler), "max_norm": 0.05}

    def step(samples: list[Sample], batch_size: int) -> tuple[float, float]:
        targets = sum(sum(learnt[1:]) for _, learnt in samples)
        return take_step(model, optimizer, share(samples, batch_size=batch_size), targets=targets, **loop)

    return step


def train(model: nn.Module, *, batch_size: int, scaler: bool = False) -> Any:
    """Losses and gradient norms, of a batch in the middle of which the data ends too."""
    step = step_of(model, scaler=scaler)
    batches = [SAMPLES[:SIZE], SAMPLES[SIZE:]] * (STEPS // 2)
    results = [step(batch, batch_size) for batch in batches]
    return [loss for loss, _ in results], [norm for _, norm in results]


def train_sharded(strategy: str, use_orig_params: bool, batch_size: int, scaler: bool) -> Any:
    model = FullyShardedDataParallel(
        TinyLM(),
        device_id=CPU,
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=use_orig_params,
    )
    results = train(model, batch_size=batch_size, scaler=scaler)
    with FullyShardedDataParallel.summon_full_params(model):
        return *results, {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "batch_size", "strategy", "use_orig_params", "scaler"),
    [
        (2, 3, "FULL_SHARD", False, False),
        (2, 2, "SHARD_GRAD_OP", True, False),
        (3, 2, "FULL_SHARD", True, False),
        (2, 6, "NO_SHARD", True, False),
        (2, 1, "FULL_SHARD", False, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:FutureWarning")
def test_ranks_equal_one_process(
    world: int, batch_size: int, strategy: str, use_orig_params: bool, scaler: bool
) -> None:
    reference = TinyLM()
    losses, norms = train(reference, batch_size=SIZE)
    for found in run_ranks(train_sharded, world, strategy, use_orig_params, batch_size, scaler):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(found[2], reference.state_dict(), rtol=1e-5, atol=1e-6)


def fully_sharded(mesh: tuple[int, ...]) -> TinyLM:
    """FSDP2, each layer a group, and the root."""
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    model = TinyLM()
    for module in (model.embed, model.head, model):
        fully_shard(module, mesh=device_mesh)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_fully_sharded(mesh: tuple[int, ...], batch_size: int, scaler: bool) -> Any:
    model = fully_sharded(mesh)
    results = train(model, batch_size=batch_size, scaler=scaler)
    return *results, {name: whole(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mesh", "batch_size", "scaler"),
    [((2,), 3, False), ((2,), 1, True), ((3,), 2, False), ((2, 2), 1, True)],
)
def test_ranks_of_fsdp2_equal_one_process(mesh: tuple[int, ...], batch_size: int, scaler: bool) -> None:
    reference = TinyLM()
    losses, norms = train(reference, batch_size=SIZE)
    for found in run_ranks(train_fully_sharded, math.prod(mesh), mesh, batch_size, scaler):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(found[2], reference.state_dict(), rtol=1e-5, atol=1e-6)


def overflow_on_one_rank(kind: str, fused: bool) -> tuple[bool, float, float]:
    """An infinite gradient in one shard: whether the step is skipped here, the norm, and the scale after it."""
    model = fully_sharded((2,)) if kind == "fsdp2" else FullyShardedDataParallel(TinyLM(), device_id=CPU)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    strategy = strategy_of(model, CPU)
    scaler = strategy.grad_scaler(enabled=True)
    before = [local(parameter).clone() for parameter in model.parameters()]
    loss = model(input_ids=share(SAMPLES[:4], batch_size=2)[0][0]).logits.sum()
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # no annotation upstream
    if dist.get_rank() == 1:
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        local(gradient).view(-1)[0] = torch.inf
    scaler.unscale_(optimizer)
    norm = strategy.clip(model, 1.0).item()
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    same = all(torch.equal(local(p), old) for p, old in zip(model.parameters(), before, strict=True))
    return same, norm, scaler.get_scale() / scale


def local(tensor: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found.detach()


@pytest.mark.distributed
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_overflow_on_one_rank_skips_the_step_on_all(kind: str, fused: bool) -> None:
    for skipped, norm, factor in run_ranks(overflow_on_one_rank, 2, kind, fused):
        assert skipped
        assert not math.isfinite(norm)
        assert factor == 0.5


def count_exchanges() -> list[int]:
    """How often gradients were exchanged: after a step of three micro-batches, and after another of one."""
    model = FullyShardedDataParallel(TinyLM(), device_id=CPU)
    calls: list[None] = []

    def counting(state: DefaultState, gradient: torch.Tensor, shard: torch.Tensor) -> None:
        calls.append(None)
        reduce_scatter_hook(state, gradient, shard)

    model.register_comm_hook(DefaultState(process_group=dist.group.WORLD), counting)
    counts = []
    for batch_size in (2, 6):
        step_of(model)(SAMPLES[:12], batch_size)
        counts.append(len(calls))
    return counts


@pytest.mark.distributed
def test_gradients_are_exchanged_once_a_step() -> None:
    assert run_ranks(count_exchanges, 2) == [[1, 2], [1, 2]]


class CountingReductions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.c10d._reduce_scatter_base_.default
        return function(*args, **(kwargs or {}))


def count_exchanges_of_fsdp2() -> list[int]:
    """Of a step of three micro-batches, and of another of one."""
    model = fully_sharded((2,))
    counts = []
    for batch_size in (2, 6):
        with CountingReductions() as seen:
            step_of(model)(SAMPLES[:12], batch_size)
        counts.append(seen.count)
    return counts


@pytest.mark.distributed
def test_fsdp2_exchanges_the_gradients_of_each_group_once_a_step() -> None:
    assert run_ranks(count_exchanges_of_fsdp2, 2) == [[2, 2], [2, 2]]


def train_replicated(batch_size: int, scaler: bool) -> Any:
    model = DistributedDataParallel(TinyLM())
    results = train(model, batch_size=batch_size, scaler=scaler)
    return *results, model.module.state_dict()


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "batch_size", "scaler"), [(2, 3, False), (2, 1, True), (3, 2, False)])
def test_ranks_of_ddp_equal_one_process(world: int, batch_size: int, scaler: bool) -> None:
    reference = TinyLM()
    losses, norms = train(reference, batch_size=SIZE)
    for found in run_ranks(train_replicated, world, batch_size, scaler):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(found[2], reference.state_dict(), rtol=1e-5, atol=1e-6)


def count_exchanges_of_ddp() -> list[int]:
    """How often gradients were exchanged: after a step of three micro-batches, and after another of one."""
    model = DistributedDataParallel(TinyLM())
    calls: list[None] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # DDP wants no text here
        calls.append(None)
        return allreduce_hook(state, bucket)

    model.register_comm_hook(dist.group.WORLD, counting)
    counts = []
    for batch_size in (2, 6):
        step_of(model)(SAMPLES[:12], batch_size)
        counts.append(len(calls))
    return counts


@pytest.mark.distributed
def test_ddp_exchanges_gradients_once_a_step() -> None:
    assert run_ranks(count_exchanges_of_ddp, 2) == [[1, 2], [1, 2]]


def test_a_plain_model_is_unsharded() -> None:
    assert strategy_of(TinyLM(), CPU).label == "unsharded"


def find_nested() -> list[str]:
    fsdp1 = FullyShardedDataParallel(nn.Sequential(TinyLM()), device_id=CPU)
    models = (fsdp1, fully_sharded((2,)), DistributedDataParallel(TinyLM()))
    return [strategy_of(nn.Sequential(model)).label for model in models]


@pytest.mark.distributed
def test_sharding_is_found_below_the_root() -> None:
    assert run_ranks(find_nested, 2) == [["FSDP1", "FSDP2", "DDP"]] * 2


def state_below_the_root() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = nn.Sequential(DistributedDataParallel(TinyLM()))
    return strategy_of(model).trainable_state(model), {f"0.{name}": p.data for name, p in TinyLM().named_parameters()}


@pytest.mark.distributed
def test_state_of_ddp_is_whole_on_rank_0_under_plain_names() -> None:
    (found, expected), (elsewhere, _) = run_ranks(state_below_the_root, 2)
    assert elsewhere == {}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
