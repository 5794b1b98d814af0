"""Batches: the same samples in the same steps on any number of ranks, and the padding of what is left over."""

from __future__ import annotations

from array import array
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.finetune.batches import IGNORED, collate, global_batches, micro_batches, share, steps_in
from surgery.finetune.encode import Sample

PAD = 99


def sample(*ids: int, learnt: list[int] | None = None) -> Sample:
    return Sample(ids=array("i", ids), learnt=array("b", learnt or [1] * len(ids)))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, None, 4), (2, None, 7), (None, 50, 50), (1, 2, 2), (2, 50, 7)],
)
def test_steps(epochs: int | None, max_steps: int | None, expected: int) -> None:
    assert steps_in(10, size=3, epochs=epochs, max_steps=max_steps) == expected


def test_steps_need_a_limit() -> None:
    with pytest.raises(ValueError, match="found neither"):
        steps_in(10, size=3, epochs=None, max_steps=None)


@given(samples=st.integers(1, 30), size=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_has_every_sample_once(samples: int, size: int, epochs: int, seed: int) -> None:
    steps = steps_in(samples, size=size, epochs=epochs, max_steps=None)
    batches = list(global_batches(samples, size=size, steps=steps, epochs=epochs, seed=seed))
    stream = list(chain.from_iterable(batches))
    assert [len(batch) for batch in batches[:-1]] == [size] * (steps - 1)
    assert 1 <= len(batches[-1]) <= size
    for epoch in range(epochs):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int) -> list[list[int]]:
        return list(global_batches(50, size=50, steps=2, epochs=2, seed=seed))

    first, second = order(0)
    assert first != second
    assert order(0) == [first, second]
    assert order(1) != [first, second]


def test_without_epochs_the_data_is_repeated() -> None:
    batches = list(global_batches(3, size=2, steps=6, epochs=None, seed=0))
    assert [len(batch) for batch in batches] == [2] * 6


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 5),
)
def test_ranks_divide_a_global_batch(count: int, batch_size: int, accumulation: int, world: int) -> None:
    indices = list(range(min(count, batch_size * accumulation * world)))
    shares = [micro_batches(indices, batch_size=batch_size, world=world, rank=rank) for rank in range(world)]
    assert sorted(chain.from_iterable(chain.from_iterable(shares))) == indices
    assert len({len(micros) for micros in shares}) == 1
    assert len(shares[0]) <= accumulation
    assert all(len(micro) <= batch_size for micros in shares for micro in micros)
    assert shares[0][-1], "rank 0 takes what is left over, so a round in which nobody has a sample does not exist"


def test_collate_pads_on_the_right_and_shifts_the_targets() -> None:
    batch = collate([sample(1, 2, 3), sample(4, 5, learnt=[0, 1])], pad=PAD)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 5, PAD]]
    assert batch.targets.tolist() == [[2, 3, IGNORED], [5, IGNORED, IGNORED]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_collate_leaves_masked_tokens_out_of_the_targets() -> None:
    batch = collate([sample(1, 2, 3, 4, learnt=[1, 0, 1, 0])], pad=PAD)
    assert batch.targets.tolist() == [[IGNORED, 3, IGNORED, IGNORED]]


def test_no_mask_where_there_is_no_padding() -> None:
    assert collate([sample(1, 2), sample(3, 4)], pad=PAD).mask is None


def test_share_counts_the_whole_global_batch_on_every_rank() -> None:
    samples = [sample(1, 2, 3), sample(4, 5, learnt=[0, 1]), sample(6, 7, 8, 9, learnt=[0, 0, 0, 1])]
    shares = [share(samples, [2, 0, 1], batch_size=1, world=2, rank=rank, pad=PAD) for rank in (0, 1)]
    assert [(part.targets, part.tokens) for part in shares] == [(4, 9), (4, 9)]
    learnt = [int((micro.targets != IGNORED).sum()) for part in shares for micro in part.micro_batches]
    assert sum(learnt) == 4


def test_rank_without_a_sample_still_has_a_batch_that_teaches_nothing() -> None:
    part = share([sample(1, 2, 3)], [0], batch_size=2, world=2, rank=1, pad=PAD)
    (micro,) = part.micro_batches
    assert micro.ids.tolist() == [[1, 2]]
    assert (micro.targets == IGNORED).all()
