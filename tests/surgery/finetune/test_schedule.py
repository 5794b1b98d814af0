"""Learning rates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import ConfigError
from surgery.finetune.arguments import ScheduleName
from surgery.finetune.batches import Schedule


def rates(name: ScheduleName, steps: int, warmup: int = 0) -> list[float]:
    schedule = Schedule(name=name, peak=2.0, steps=steps, warmup_steps=warmup)
    return [schedule.rate(step) for step in range(steps)]


def test_constant() -> None:
    assert rates("constant", 3) == [2.0, 2.0, 2.0]


def test_linear() -> None:
    assert rates("linear", 4) == [2.0, 1.5, 1.0, 0.5]


def test_cosine() -> None:
    assert rates("cosine", 4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


def test_warmup_ends_at_the_peak() -> None:
    assert rates("linear", 6, warmup=2) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]


def test_warmup_may_take_all_steps() -> None:
    assert rates("cosine", 2, warmup=2) == [1.0, 2.0]


@given(
    name=st.sampled_from(["cosine", "linear", "constant"]),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 50),
)
def test_every_step_learns_and_none_exceeds_the_peak(name: ScheduleName, steps: int, warmup: int) -> None:
    warmup = min(warmup, steps)
    found = rates(name, steps, warmup)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("peak", [0.0, -1.0, math.nan, math.inf])
def test_peak_out_of_range(peak: float) -> None:
    with pytest.raises(ConfigError, match="learning rate above 0"):
        Schedule(name="constant", peak=peak, steps=1)


def test_more_warmup_than_steps() -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 3 warmup steps .* found 4"):
        Schedule(name="cosine", peak=1.0, steps=3, warmup_steps=4)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="cosine, linear or constant, found 'step'"):
        Schedule(name="step", peak=1.0, steps=3)  # type: ignore[arg-type]  # what a script may pass
