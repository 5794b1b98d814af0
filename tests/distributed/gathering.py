"""What a rank does in the tests of FSDP2's all-gather: shard 4-bit blocks, train, compare each weight in forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import patches
from tests.helpers.rewritten_nans import nan_words, rewritten_nans

ID = "torch.fsdp2-bit-exact-gather"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS = 3
BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to shard. `storage` is of the packed weights, `adapter` of everything else, `options` are fully_shard's."""

    name: str
    storage: torch.dtype = BF16
    adapter: torch.dtype = BF16
    mesh: tuple[int, ...] = (2,)
    options: dict[str, Any] = field(default_factory=dict)
    one_dtype: bool = True
    """FSDP2 gathers a block as one dtype, and so, on CUDA, changes it."""


ON_TWO = [
    Case(name="bf16"),
    Case(name="fp16", storage=FP16, adapter=FP16),
    Case(name="mixed", adapter=FP32, one_dtype=False),
    Case(name="cast-to-bf16", adapter=FP32, options={"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)}),
    Case(name="kept-after-forward", options={"reshard_after_forward": False}),
    Case(name="offloaded", options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
]
ON_FOUR = [
    Case(name="hybrid", mesh=(2, 2)),
    Case(name="resharded-to-two", mesh=(4,), options={"reshard_after_forward": 2}),
]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Words of two bytes that were not as packed, over all layers and steps; losses; calls of the patch."""

    changed: int
    losses: list[float]
    calls: int = 0


class Block(nn.Module):
    """A frozen 4-bit layer, every stored word of it a NaN, with a trainable one beside it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        base: Any = Linear4bit(64, 64, bias=False, compute_dtype=FP32, quant_type="nf4", quant_storage=case.storage)
        self.base = base.to("cpu")  # where it is quantized
        self.base.weight.data.copy_(nan_words(case.storage, self.base.weight.numel()).view(-1, 1))
        self.adapter = nn.Linear(64, 64, bias=False, dtype=case.adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Computes in the dtype of its input, as FSDP2's mixed precision does.
        return torch.tanh(self.base(x) + nn.functional.linear(x, self.adapter.weight.to(x.dtype)))


def make_model(case: Case) -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(case) for _ in range(BLOCKS)))


def train(model: nn.Sequential, dtype: torch.dtype) -> Found:
    """A few steps of SGD, on the same batch on every rank."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    packed = nan_words(layers[0].quant_storage, 64 * 64 // 4).view(torch.int16)
    changed: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, _: changed.append(int((layer.weight.view(-1).view(torch.int16) != packed).sum()))
        )
        for layer in layers
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    losses = []
    for _ in range(STEPS):
        loss = model(x).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # no annotation upstream
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for hook in hooks:
        hook.remove()
    assert len(changed) == BLOCKS * STEPS
    return Found(changed=sum(changed), losses=losses)


def unsharded(case: Case) -> Found:
    """The same in one process, on the dtypes that the sharded model computes in."""
    policy = case.options.get("mp_policy")
    model = make_model(case)
    return train(model, policy.param_dtype if policy else case.adapter)


def sharded(case: Case) -> nn.Sequential:
    """Stock FSDP2, each block a group."""
    model = make_model(case)
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=("replicate", "shard")[-len(case.mesh) :])
    for block in model:
        fully_shard(block, mesh=mesh, **case.options)
    fully_shard(model, mesh=mesh, **case.options)
    return model


def stock(case: Case) -> Found:
    """FSDP2 as it is."""
    return train(sharded(case), case.adapter)


def patched(case: Case) -> Found:
    """FSDP2 with the patch on the layers of this model."""
    model = sharded(case)
    with gather_patch(model) as tx:
        found = train(model, case.adapter)
    return Found(changed=found.changed, losses=found.losses, calls=tx.receipts[0].calls)


@contextlib.contextmanager
def gather_patch(model: nn.Module) -> Iterator[patches.Transaction]:
    """The patch, limited to the 4-bit layers of `model`; forced, since a CPU does not need it."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    with patches.transaction(ID, on=layers, reason="a test", force=True, count_calls=True) as tx:
        yield tx


def run_cases(cases: list[Case], *, as_on_cuda: bool) -> dict[str, tuple[Found, Found]]:
    """Case -> what stock and patched FSDP2 do on this rank."""
    with rewritten_nans() if as_on_cuda else contextlib.nullcontext():
        return {case.name: (stock(case), patched(case)) for case in cases}


def exact_and_as_on_cuda(cases: list[Case]) -> dict[bool, dict[str, tuple[Found, Found]]]:
    """As on CUDA, or not -> what `run_cases` finds."""
    return {as_on_cuda: run_cases(cases, as_on_cuda=as_on_cuda) for as_on_cuda in (False, True)}


def two_models() -> tuple[Found, Found]:
    """Two models trained while the patch is in force for the first, which copies as on CUDA would damage."""
    case = ON_TWO[0]
    ours, theirs = sharded(case), sharded(case)
    with rewritten_nans(), gather_patch(ours):
        return train(ours, case.adapter), train(theirs, case.adapter)


def needed() -> tuple[list[str], Found, list[patches.Receipt]]:
    """The verdicts where copies rewrite NaN, what is found with nothing forced, and what is active afterwards."""
    case = ON_TWO[0]
    model = sharded(case)
    with rewritten_nans():
        with patches.transaction(ID, reason="a test") as tx:
            found = train(model, case.adapter)
        return [str(verdict) for verdict in tx.verdicts.values()], found, patches.active()
