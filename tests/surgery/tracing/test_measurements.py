"""Samples of memory: bounded in number, and no peak lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from surgery.telemetry.measurements import History, MemorySample

BYTES = st.integers(0, 2**40)


@given(st.lists(st.tuples(BYTES, BYTES, BYTES), min_size=1, max_size=300), st.integers(2, 17))
def test_thinned_samples_keep_order_and_every_maximum(values: list[tuple[int, int, int]], limit: int) -> None:
    history = History(limit=limit)
    for second, value in enumerate(values):
        history.add(MemorySample(float(second), *value))
    kept = history.samples
    assert len(kept) <= limit
    starts = [int(sample.seconds) for sample in kept]
    for sample, start, end in zip(kept, starts, [*starts[1:], len(values)], strict=True):
        assert start < end
        assert sample[1:] == tuple(map(max, zip(*values[start:end], strict=True)))
    assert starts[0] == 0


def test_samples_are_thinned_evenly() -> None:
    history = History(limit=64)
    for second in range(10_000):
        history.add(MemorySample(float(second), second))
    widths = {int(after.seconds - before.seconds) for before, after in pairwise(history.samples)}
    assert widths == {256}
    assert 32 <= len(history.samples) <= 64


def test_few_samples_are_kept_as_they_are() -> None:
    history = History(limit=4)
    samples = [MemorySample(float(second), 10 - second) for second in range(4)]
    for sample in samples:
        history.add(sample)
    assert history.samples == samples
