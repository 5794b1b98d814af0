"""Laws of the division: every row is read once, kept where FSDP2 keeps it, and every block is counted by one rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.config import BLOCKSIZES, DDP, FSDP1, FSDP2, STORAGE_DTYPES
from surgery.sharding.base import strategy_for
from surgery.sharding.partition import Form, Grid, Partition, Slice, chunk

HYBRID = FSDP1(strategy="hybrid-shard", mesh=(2, 3))


@st.composite
def packed_forms(draw: st.DrawFn) -> Form:
    """Forms of packed weights: with every storage, block size and tail, smaller than a block too."""
    rows = draw(st.integers(1, 12) | st.integers(1, 6000))
    row = 2 * draw(st.sampled_from(STORAGE_DTYPES)).itemsize
    is_odd = draw(st.booleans())  # the last byte then holds one value
    return Form(rows=rows, row=row, numel=rows * row - is_odd, blocksize=draw(st.sampled_from(BLOCKSIZES)))


@st.composite
def plain_forms(draw: st.DrawFn) -> Form:
    """Forms of what is not quantized; some are empty."""
    rows, row = draw(st.integers(0, 60)), draw(st.integers(0, 40))
    return Form(rows=rows, row=row, numel=rows * row, is_buffer=draw(st.booleans()))


@st.composite
def divisions(draw: st.DrawFn) -> Partition:
    """Every division that a strategy makes."""
    mesh = draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
    options = draw(st.sampled_from((FSDP2(mesh=mesh), FSDP1(), DDP(), None)))
    return division_of(options, mesh[0] * mesh[1])


def division_of(options: Any, world_size: int, placement: str | None = None) -> Partition:
    return strategy_for(options, world_size=world_size, placement=placement).partition


forms = packed_forms() | plain_forms()


def in_order(ranges: Sequence[range]) -> list[int]:
    """What all `ranges` hold, the earliest first; a number in two of them comes twice."""
    return list(chain.from_iterable(sorted(ranges, key=lambda each: (each.start, each.stop))))


def lengths(ranges: Sequence[range]) -> list[int]:
    return [len(each) for each in ranges]


@given(rows=st.integers(0, 500), parts=st.integers(1, 12))
def test_chunks_are_those_of_torch(rows: int, parts: int) -> None:
    expected = [len(part) for part in torch.arange(rows).chunk(parts)]
    found = [chunk(range(rows), parts, part) for part in range(parts)]
    assert lengths(found) == expected + [0] * (parts - len(expected))
    assert in_order(found) == list(range(rows))


@given(form=forms, division=divisions())
def test_every_row_is_read_by_one_rank(form: Form, division: Partition) -> None:
    assert in_order([share.reads for share in division.slices(form)]) == list(range(form.rows))


@given(form=forms, division=divisions())
def test_who_keeps_rows_reads_them_or_its_replicas_do(form: Form, division: Partition) -> None:
    shares = division.slices(form)
    for share in shares:
        same = [other.reads for other in shares if other.keeps == share.keeps]
        assert set(share.reads) <= set(share.keeps)
        assert in_order(same) == list(share.keeps) * (len(share.keeps) > 0)


@given(form=forms, mesh=st.tuples(st.integers(1, 3), st.integers(1, 5)))
def test_shards_are_those_of_fsdp2(form: Form, mesh: tuple[int, int]) -> None:
    """`fully_shard` chunks dimension 0 over the columns of its mesh, and repeats that in each of its rows."""
    replicas, shards = mesh
    division = division_of(FSDP2(mesh=mesh), replicas * shards)
    sizes = [len(part) for part in torch.arange(form.rows).chunk(shards)]
    expected = [form.rows] * shards if form.is_buffer else sizes + [0] * (shards - len(sizes))
    assert lengths([share.keeps for share in division.slices(form)]) == expected * replicas


@given(form=forms, world_size=st.integers(1, 6))
def test_replicas_keep_everything(form: Form, world_size: int) -> None:
    shares = division_of(DDP(), world_size).slices(form)
    assert {share.keeps for share in shares} == {range(form.rows)}


@given(form=plain_forms().filter(lambda form: not form.is_buffer), world_size=st.integers(1, 6))
def test_rank0_alone_reads_what_it_keeps_alone(form: Form, world_size: int) -> None:
    first, *others = division_of(FSDP1(), world_size).slices(form)
    assert (first.keeps, first.reads, first.elements) == (range(form.rows), range(form.rows), range(form.numel))
    assert all(not share.keeps and not share.reads and not share.elements for share in others)


@given(form=packed_forms(), world_size=st.integers(1, 6))
def test_all_ranks_quantize_for_rank0(form: Form, world_size: int) -> None:
    shares = division_of(FSDP1(), world_size).slices(form)
    assert shares == division_of(FSDP2(), world_size).slices(form)


@given(form=packed_forms(), division=divisions())
def test_elements_are_the_rows_rounded_out_to_whole_blocks(form: Form, division: Partition) -> None:
    assert form.blocksize is not None
    for share in division.slices(form):
        exact = form.elements(share.reads)
        if not exact:
            assert not share.elements
            continue
        assert 0 <= exact.start - share.elements.start < form.blocksize
        assert 0 <= share.elements.stop - exact.stop < form.blocksize
        assert share.elements.start % form.blocksize == 0
        assert share.elements.stop % form.blocksize == 0 or share.elements.stop == form.numel


@given(form=plain_forms(), division=divisions())
def test_what_is_not_quantized_is_read_exactly(form: Form, division: Partition) -> None:
    shares = division.slices(form)
    assert in_order([share.elements for share in shares]) == list(range(form.numel))
    assert not any(share.blocks for share in shares)
    assert form.blocks == 0


@given(form=packed_forms(), division=divisions())
def test_ranks_read_two_blocks_each_at_most_beyond_the_tensor(form: Form, division: Partition) -> None:
    assert form.blocksize is not None
    shares = division.slices(form)
    assert set(chain.from_iterable(share.elements for share in shares)) == set(range(form.numel))
    beyond = sum(len(share.elements) for share in shares) - form.numel
    assert 0 <= beyond <= 2 * form.blocksize * len(shares)


@given(form=packed_forms(), division=divisions())
def test_every_block_is_counted_by_one_rank_that_reads_it_whole(form: Form, division: Partition) -> None:
    assert form.blocksize is not None
    shares = division.slices(form)
    assert in_order([share.blocks for share in shares]) == list(range(form.blocks))
    for share in shares:
        first, last = share.blocks.start * form.blocksize, min(share.blocks.stop * form.blocksize, form.numel)
        assert not share.blocks or (share.elements.start <= first and last <= share.elements.stop)


@given(form=forms, division=divisions())
def test_there_is_room_for_the_largest_shard_and_for_equal_parts_of_replicas(form: Form, division: Partition) -> None:
    shares, replicas = division.slices(form), division.grid_of(form).replicas
    rooms = [division.capacity(form, rank) for rank in range(len(shares))]
    longest = max(lengths([share.keeps for share in shares]))
    for share, room in zip(shares, rooms, strict=True):
        same = [other.reads for other in shares if other.keeps == share.keeps]
        assert len(share.keeps) <= room < longest + replicas
        assert not share.keeps or len(same) * max(lengths(same)) <= room
    assert len(set(rooms)) == 1 or division.is_rank0s(form)


@given(form=plain_forms().filter(lambda form: form.is_buffer), division=divisions())
def test_every_rank_keeps_buffers_and_reads_a_part_of_them(form: Form, division: Partition) -> None:
    world_size = division.grid.world_size
    shares = division.slices(form)
    assert {share.keeps for share in shares} == {range(form.rows)}
    assert [share.reads for share in shares] == [
        chunk(range(form.rows), world_size, rank) for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("options", "placement", "loading", "at_rest"),
    [
        (FSDP2(), None, Partition(grid=Grid(shards=6)), Grid(shards=6)),
        (FSDP2(mesh=(2, 3)), None, Partition(grid=Grid(replicas=2, shards=3)), Grid(replicas=2, shards=3)),
        (FSDP2(mesh=(6, 1)), None, Partition(grid=Grid(replicas=6)), Grid(replicas=6)),
        (FSDP2(), "replicated", Partition(grid=Grid(replicas=6)), Grid(shards=6)),
        (FSDP2(mesh=(2, 3)), "replicated", Partition(grid=Grid(replicas=6)), Grid(replicas=2, shards=3)),
        (FSDP1(), None, Partition(grid=Grid(shards=6), rank0_only=True), Grid(shards=6)),
        (FSDP1(), "replicated", Partition(grid=Grid(replicas=6)), Grid(shards=6)),
        (HYBRID, None, Partition(grid=Grid(shards=6), rank0_only=True), Grid(replicas=2, shards=3)),
        (FSDP1(strategy="no-shard"), None, Partition(grid=Grid(shards=6), rank0_only=True), Grid(replicas=6)),
        (DDP(), None, Partition(grid=Grid(replicas=6)), Grid(replicas=6)),
        (None, None, Partition(grid=Grid(replicas=6)), Grid(replicas=6)),
    ],
)
def test_division_while_a_model_is_loaded_and_after(
    options: Any, placement: str | None, loading: Partition, at_rest: Grid
) -> None:
    strategy = strategy_for(options, world_size=6, placement=placement)
    assert (strategy.partition, strategy.at_rest) == (loading, at_rest)


@pytest.mark.parametrize("options", [FSDP2(), FSDP1(), DDP(), None], ids=str)
def test_one_rank_keeps_and_reads_all(options: Any) -> None:
    form = Form(rows=5, row=8, numel=39, blocksize=32)
    division = division_of(options, 1)
    assert not division.rank0_only
    assert division.slices(form) == (Slice(keeps=range(5), reads=range(5), elements=range(39), blocks=range(2)),)
    assert division.capacity(form, 0) == 5


def test_three_shards_of_a_small_weight() -> None:
    """47 elements in 6 rows of 8 (float32 storage), and blocks of 32: the second shard lies within the first block."""
    division = division_of(FSDP2(), 3)
    assert division.slices(Form(rows=6, row=8, numel=47, blocksize=32)) == (
        Slice(keeps=range(2), reads=range(2), elements=range(32), blocks=range(1)),
        Slice(keeps=range(2, 4), reads=range(2, 4), elements=range(32), blocks=range(1, 1)),
        Slice(keeps=range(4, 6), reads=range(4, 6), elements=range(32, 47), blocks=range(1, 2)),
    )
