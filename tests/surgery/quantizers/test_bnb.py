"""Ranges that are quantized apart, and joined, have the bits that bitsandbytes gives for the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.checkpoint import TensorEntry
from surgery.config import BLOCKSIZES, FSDP1, FSDP2, STORAGE_DTYPES, Placement, Quant
from surgery.errors import ConfigError
from surgery.model.keys import Assignment
from surgery.passes.tensors import ShardBuffer, ShardBuffers, Target, find_targets
from surgery.quantizers import base
from surgery.quantizers.base import Layout
from surgery.quantizers.bnb import Bnb4bit
from surgery.sharding.base import Devices, strategy_for
from surgery.sharding.partition import Partition, chunk
from tests.helpers.lookup import require_looked_up
from tests.helpers.whole_blocks import right_kernels

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: What a block is multiplied by: nothing left of it, float32 that bfloat16 just holds, and numbers that vanish.
SCALES = (0.0, 1.0, 1e-3, 1e4, 1e-30, 1e30)

quants = st.builds(
    Quant,
    st.sampled_from(("nf4", "fp4")),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    quant_storage=st.sampled_from(STORAGE_DTYPES),
)

#: One to four ranks in every arrangement, for each placement.
worlds: st.SearchStrategy[tuple[Placement, tuple[int, int]]] = st.tuples(
    st.sampled_from(("sharded", "rank0-cpu", "replicated")),
    st.sampled_from(((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (2, 2))),
)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """A finite matrix, of any shape and dtype, some transposed, whose rows are of very different sizes."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 160))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scales = torch.tensor(draw(st.lists(st.sampled_from(SCALES), min_size=rows, max_size=rows)))
    largest = torch.finfo(dtype).max
    values = (torch.randn(rows, columns, generator=generator) * scales[:, None]).clamp(-largest, largest).to(dtype)
    return values.t() if draw(st.booleans()) else values


@contextmanager
def runs_of(elements: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.RUN_ELEMENTS, "cpu", elements)
        yield


def target_of(weight: torch.Tensor, quant: Bnb4bit) -> Target:
    """The target of a model with one linear layer, whose weight the checkpoint has as `weight`."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    entry = TensorEntry(
        name="weight", file=Path("w"), dtype=weight.dtype, shape=tuple(weight.shape), start=0, end=weight.nbytes
    )
    assignment = Assignment(targets=("weight",), sources=("weight",), dtypes=(weight.dtype,))
    index: Any = {"weight": entry}
    (target,) = find_targets(quant.replacement(linear), [assignment], index, [quant], tied={})
    return target


def filled(target: Target, parts: ShardBuffers, flat: torch.Tensor, step: int) -> ShardBuffer:
    """The part of one rank, given what it reads of `flat` in chunks of `step`."""
    with rooms_marked():
        part = parts.begin(target)
        wanted = part.slice.elements
        for start in range(wanted.start, wanted.stop, step):
            parts.fill(part, start, flat[start : min(start + step, wanted.stop)])
    return part


@contextmanager
def rooms_marked() -> Iterator[None]:
    """What a part has memory for and is not written shows."""
    stock = ShardBuffers._make_room

    def marked(parts: ShardBuffers, part: ShardBuffer) -> None:
        stock(parts, part)
        part.data.view(torch.uint8).fill_(0xA5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardBuffers, "_make_room", marked)
        yield


def state_of(parts: Sequence[ShardBuffer], quant: Bnb4bit, shape: torch.Size) -> QuantState:
    """The state of the whole, from the statistics of all ranks."""
    in_order = sorted(parts, key=lambda part: (part.slice.blocks.start, part.slice.blocks.stop))
    statistics = torch.cat([part.statistics for part in in_order if part.statistics is not None])
    return quant.states([statistics], [shape], [None])[0]


def joined(parts: Sequence[ShardBuffer]) -> torch.Tensor:
    """The packed rows that all ranks have made, in the order of the ranks, which is that of the rows here."""
    in_order = sorted(parts, key=lambda part: (part.slice.reads.start, part.slice.reads.stop))
    return torch.cat([part.read_rows() for part in in_order])


def assert_same_state(found: QuantState, expected: QuantState) -> None:
    found_dict, expected_dict = found.as_dict(), expected.as_dict()
    assert found_dict.keys() == expected_dict.keys()
    for key, value in expected_dict.items():
        if isinstance(value, torch.Tensor):
            assert found_dict[key].dtype == value.dtype, key
            assert torch.equal(found_dict[key], value), key
        else:
            assert found_dict[key] == value, key


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def layout_of(quant: Quant) -> Layout:
    return Layout(values_per_byte=2, blocksize=quant.blocksize)


def whole(weight: torch.Tensor, quant: Quant, dtype: torch.dtype) -> tuple[torch.Tensor, QuantState]:
    """What bitsandbytes makes of it."""
    packed, state = quantize_4bit(
        weight.to(dtype).contiguous(),
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type,
        quant_storage=quant.quant_storage,
    )
    return packed, state


def partition_of(world: tuple[Placement, tuple[int, int]]) -> Partition:
    placement, mesh = world
    shard = FSDP1() if placement == "rank0-cpu" else FSDP2(mesh=mesh)
    return strategy_for(shard, world_size=mesh[0] * mesh[1], placement=placement).partition


def parts_of_all_ranks(
    target: Target, quant: Bnb4bit, partition: Partition, flat: torch.Tensor, step: int
) -> list[ShardBuffer]:
    devices = Devices(compute=CPU, data=CPU)
    each = [ShardBuffers(partition=partition, devices=devices, rank=rank) for rank in range(partition.grid.world_size)]
    return [filled(target, parts, flat, step) for parts in each]


@settings(deadline=None, max_examples=400)
@given(
    weight=weights(),
    quant=quants,
    world=worlds,
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    blocks=st.tuples(st.integers(1, 8), st.integers(1, 4)),
)
def test_parts_of_all_ranks_join_to_the_bits_of_the_whole(
    weight: torch.Tensor,
    quant: Quant,
    world: tuple[Placement, tuple[int, int]],
    dtype: torch.dtype,
    blocks: tuple[int, int],
) -> None:
    """`blocks`: read at a time, and quantized at a time."""
    quant_format = Bnb4bit(quant, dtype=dtype, compute_dtype=dtype)
    storage = quant.storage_for(dtype)
    if ((weight.numel() + 1) // 2) % storage.itemsize:
        with pytest.raises(ConfigError, match="packs into"):
            layout_of(quant).packed_shape(weight.shape, storage)
        return
    target, step = target_of(weight, quant_format), blocks[0] * quant.blocksize
    with runs_of(blocks[1] * quant.blocksize):
        parts = parts_of_all_ranks(target, quant_format, partition_of(world), weight.reshape(-1), step)
    expected, expected_state = whole(weight, quant, dtype)
    assert target.shape == expected.shape
    assert target.dtype == expected.dtype == joined(parts).dtype
    assert torch.equal(as_bytes(joined(parts)), as_bytes(expected))
    assert_same_state(state_of(parts, quant_format, weight.shape), expected_state)


@settings(deadline=None)
@given(weight=weights(), shards=st.integers(1, 4), blocksize=st.sampled_from(BLOCKSIZES))
def test_a_part_is_the_shard_of_fsdp2(weight: torch.Tensor, shards: int, blocksize: int) -> None:
    quant = Quant(blocksize=blocksize, quant_storage=torch.uint8)
    quant_format = Bnb4bit(quant, dtype=torch.float32)
    partition = strategy_for(FSDP2(), world_size=shards).partition
    parts = parts_of_all_ranks(target_of(weight, quant_format), quant_format, partition, weight.reshape(-1), blocksize)
    expected, _ = whole(weight, quant, torch.float32)
    for rank, part in enumerate(parts):
        rows = chunk(range(len(expected)), shards, rank)
        assert torch.equal(part.tensor(), expected[rows.start : rows.stop])
        assert part.data.numel() == -(-len(expected) // shards), "FSDP2 pads every shard to the largest"


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=3),
    dtype=st.sampled_from(FLOATS),
    world=worlds,
    step=st.integers(1, 20),
)
def test_parts_that_are_not_quantized_are_the_tensor_in_its_dtype(
    shape: list[int], dtype: torch.dtype, world: tuple[Placement, tuple[int, int]], step: int
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module, empty = nn.Module(), torch.empty(shape, dtype=dtype, device="meta")
    if shape:
        module.p = nn.Parameter(empty)
    else:
        module.register_buffer("p", empty)  # FSDP2 refuses scalar parameters
    entry = TensorEntry(name="p", file=Path("p"), dtype=tensor.dtype, shape=tuple(tensor.shape), start=0, end=0)
    assignment, index = Assignment(targets=("p",), sources=("p",), dtypes=(tensor.dtype,)), {"p": entry}
    quant_format = Bnb4bit(Quant(), dtype=dtype)
    (target,) = find_targets(module, [assignment], index, [quant_format], tied={})  # type: ignore[arg-type]  # as a mapping
    parts = parts_of_all_ranks(target, quant_format, partition_of(world), tensor.reshape(-1), step)
    assert torch.equal(joined(parts), tensor.reshape(-1).to(dtype))
    assert all(part.tensor().dim() == tensor.dim() for part in parts if part.slice.keeps)


def test_a_weight_of_many_default_runs_gives_the_bits_of_the_whole() -> None:
    elements = base.RUN_ELEMENTS["cpu"]
    weight = torch.randn(3, elements // 2 + 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    quant = Quant(quant_storage=torch.bfloat16)
    quant_format = Bnb4bit(quant, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    partition = strategy_for(FSDP2()).partition
    parts = parts_of_all_ranks(target_of(weight, quant_format), quant_format, partition, weight.view(-1), 2 * elements)
    expected, expected_state = whole(weight, quant, torch.bfloat16)
    assert torch.equal(as_bytes(joined(parts)), as_bytes(expected))
    state = state_of(parts, quant_format, weight.shape)
    assert_same_state(state, expected_state)
    require_table(joined(parts), state, weight)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shapes", [[(64, 512), (32, 512), (128, 256)], [(64, 512), (3, 70), (128, 256)], [(1, 8)]])
def test_states_of_many_weights_are_those_of_each_in_memory_of_its_own(
    shapes: list[tuple[int, int]], double_quant: bool
) -> None:
    quant = Quant("nf4", blocksize=64, double_quant=double_quant)
    quant_format = Bnb4bit(quant, dtype=torch.bfloat16)
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    statistics = [quant_format.quantize(weight.view(-1), layout_of(quant))[1] for weight in weights]
    states = quant_format.states(statistics, [weight.shape for weight in weights], [None] * len(weights))
    for weight, state in zip(weights, states, strict=True):
        _, expected = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
        assert_same_state(state, expected)
        assert state.absmax.untyped_storage().nbytes() == state.absmax.nbytes


def test_runs_are_of_whole_blocks() -> None:
    quant_format = Bnb4bit(Quant(), dtype=torch.bfloat16)
    for device in (CPU, torch.device("cuda", 0), torch.device("xpu")):
        assert all(quant_format.run_elements(device) % blocksize == 0 for blocksize in BLOCKSIZES)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
def test_a_quantized_module_equals_one_moved_by_bitsandbytes(
    quant_type: Any, double_quant: bool, blocksize: int, storage: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
    stock: Any = Linear4bit(96, 40, bias=False, quant_storage=storage)
    stock.weight = Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
        module=stock,
    )
    stock.to("cpu")
    quant = Quant(quant_type, blocksize=blocksize, double_quant=double_quant, quant_storage=storage)
    quant_format = Bnb4bit(quant, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    ours: Any = quant_format.replacement(linear)
    assert quant_format.is_quantized(ours)
    assert not quant_format.is_quantized(linear)
    assert quant_format.logical(ours, "weight") == linear.weight.shape
    assert ours.weight.is_meta
    packed, statistics = quant_format.quantize(linear.weight.detach().view(-1), layout_of(quant))
    (state,) = quant_format.states([statistics], [quant_format.logical(ours, "weight")], [None])
    ours.weight = quant_format.parameter(ours, packed.view(storage).view(ours.weight.shape), state)
    quant_format.set_state(ours, "weight", state)
    assert_same_parameter(ours.weight, stock.weight)
    assert ours.weight.module is ours
    assert ours.quant_state is ours.weight.quant_state is state
    require_table(ours.weight.data, state, linear.weight)


def require_table(packed: torch.Tensor, state: QuantState, weight: torch.Tensor) -> None:
    """Quantized and dequantized right, and not only as bitsandbytes has it."""
    with right_kernels():
        require_looked_up(functional.dequantize_4bit(packed, state), packed, state, weight)


def assert_same_parameter(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert (found.shape, found.requires_grad) == (expected.shape, expected.requires_grad)
    assert torch.equal(as_bytes(found.data), as_bytes(expected.data))
    assert_same_state(found.quant_state, expected.quant_state)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
        assert getattr(found, name) == getattr(expected, name), name
