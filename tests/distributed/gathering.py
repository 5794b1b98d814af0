"""What a rank does in the tests of FSDP2's all-gather: shard 4-bit blocks, train, compare each weight in forward."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

import patches
from patches.builtin.torch.fsdp2_bit_exact_gather import _KNOWN
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
    as_held: bool = True
    """A block is gathered as it is held, so that the patch finds out about it once."""


ON_TWO = [
    Case(name="bf16"),
    Case(name="fp16", storage=FP16, adapter=FP16),
    Case(name="mixed", adapter=FP32, one_dtype=False),
    Case(
        name="cast-to-bf16",
        adapter=FP32,
        options={"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)},
        as_held=False,
    ),
    Case(name="kept-after-forward", options={"reshard_after_forward": False}),
    Case(name="offloaded", options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}, as_held=False),
]
ON_FOUR = [
    Case(name="hybrid", mesh=(2, 2)),
    Case(name="resharded-to-two", mesh=(4,), options={"reshard_after_forward": 2}),
]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Words of two bytes that were not as packed, over all layers and steps; losses; calls of the patch, and how many
    groups it knows in the end.
    """

    changed: int
    losses: list[float]
    calls: int = 0
    known: int = 0


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


@contextlib.contextmanager
def counting_changes(model: nn.Module, packed: torch.Tensor) -> Iterator[list[int]]:
    """For each forward of a 4-bit layer in the block: how many words are not those of `packed`."""
    words, changed = packed.view(torch.int16), list[int]()
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, _: changed.append(int((layer.weight.view(-1).view(torch.int16) != words).sum()))
        )
        for layer in four_bit_layers(model)
    ]
    yield changed
    for hook in hooks:
        hook.remove()


def four_bit_layers(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def train(model: nn.Sequential, dtype: torch.dtype) -> Found:
    """A few steps of SGD, on the same batch on every rank."""
    packed = nan_words(four_bit_layers(model)[0].quant_storage, 64 * 64 // 4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    losses = []
    with counting_changes(model, packed) as changed:
        for _ in range(STEPS):
            loss = model(x).float().square().mean()
            loss.backward()  # type: ignore[no-untyped-call]  # no annotation upstream
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
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
    gc.collect()
    assert not _KNOWN, "something of an earlier model is kept"
    model = sharded(case)
    with gather_patch(model) as tx:
        found = train(model, case.adapter)
    return Found(changed=found.changed, losses=found.losses, calls=tx.receipts[0].calls, known=len(_KNOWN))


@contextlib.contextmanager
def gather_patch(model: nn.Module) -> Iterator[patches.Transaction]:
    """The patch, limited to the 4-bit layers of `model`; forced, since a CPU does not need it."""
    with patches.transaction(ID, on=four_bit_layers(model), reason="a test", force=True, count_calls=True) as tx:
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


def write(block: Any, shard: torch.Tensor) -> None:
    """In place, as an optimizer does, or `load_state_dict`."""
    block.base.weight.to_local().copy_(shard)


def assign(block: Any, shard: torch.Tensor) -> None:
    """Another parameter."""
    block.base.load_state_dict({"weight": like(block.base.weight, shard)}, strict=False, assign=True)


def move(block: Any, shard: torch.Tensor) -> None:
    """Other memory, as with `to`, `cuda` and `cpu`."""
    packed = block.base.weight
    block._apply(lambda tensor: like(packed, shard) if tensor is packed else tensor.clone())


def empty(block: Any, shard: torch.Tensor) -> None:
    """Other memory with nothing in it, which is then filled."""
    block.to_empty(device="cpu")
    write(block, shard)


def install(block: Any, shard: torch.Tensor) -> None:
    """Behind the back of FSDP2, which looks once more before the first forward: what `surgery` loads comes so."""
    block.base._parameters["weight"] = like(block.base.weight, shard)


Way = Callable[[Any, torch.Tensor], None]
WAYS: list[Way] = [write, assign, move, empty, install]


def like(old: Any, shard: torch.Tensor) -> nn.Parameter:
    """A parameter sharded as `old`, of which this rank holds `shard`."""
    size = {"shape": old.shape, "stride": old.stride()}
    new = DTensor.from_local(shard, old.device_mesh, old.placements, run_check=False, **size)
    return nn.Parameter(new, requires_grad=False)


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Words of the layers that were not the new ones, in a forward after all had been replaced; whether the memory of
    the old ones was free before that; how many groups were known before and after, and once the model was gone.
    """

    changed: int
    freed: list[bool]
    known: tuple[int, int, int]


def replaced() -> dict[str, Replaced]:
    """What comes of replacing packed weights, by the name of the way to do it, where copies are as on CUDA."""
    with rewritten_nans():
        return {way.__name__: _replaced(way) for way in WAYS}


def _replaced(way: Way) -> Replaced:
    case = ON_TWO[0]
    gc.collect()
    model = sharded(case)
    x = torch.randn(4, 64).to(case.adapter)
    with gather_patch(model), torch.no_grad():
        if way is not install:
            model(x)
        before = len(_KNOWN)
        memory = _replace_all(model, way)
        freed = [reference.expired() for reference in memory]
        with counting_changes(model, _new_words()) as changed:
            model(x)
    assert len(changed) == BLOCKS
    after = len(_KNOWN)
    del model
    gc.collect()
    return Replaced(changed=sum(changed), freed=freed, known=(before, after, len(_KNOWN)))


def _replace_all(model: nn.Sequential, way: Way) -> list[StorageWeakRef]:
    """Every packed weight; returns references to the memory of the old ones."""
    memory = []
    for block in model:
        block.reshard()
        held = block.base.weight
        memory.append(StorageWeakRef(held.to_local().untyped_storage()))
        shard = _new_words().view(held.shape).chunk(2)[held.device_mesh.get_local_rank()].clone()
        del held
        way(block, shard)
    return memory


def _new_words() -> torch.Tensor:
    return nan_words(BF16, 64 * 64 // 4).flip(0)
