from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from patches.testing.reduce import smallest_cause

IDS = tuple(f"fake.{letter}" for letter in "abcdefghijklm")


@given(ids=st.sets(st.sampled_from(IDS), min_size=1), data=st.data())
def test_what_breaks_together_is_found_and_nothing_else(ids: set[str], data: st.DataObject) -> None:
    cause = data.draw(st.sets(st.sampled_from(sorted(ids)), min_size=1))
    found = smallest_cause(sorted(ids), lambda tried: cause <= set(tried))
    assert found == tuple(sorted(cause))


@given(st.sampled_from(IDS))
def test_one_culprit_takes_few_runs(culprit: str) -> None:
    runs: list[tuple[str, ...]] = []

    def breaks(tried: tuple[str, ...]) -> bool:
        runs.append(tried)
        return culprit in tried

    assert smallest_cause(IDS, breaks) == (culprit,)
    assert len(runs) <= 12
    assert () not in runs
