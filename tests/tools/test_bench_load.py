"""`tools/bench_load.py`: what a comparison comes to, and that failures are results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest

from loading.chart import chart
from loading.options import Options, add_arguments
from loading.outcome import Journal, Load, Outcome, Training, collect
from loading.results import Results
from loading.summary import summarize


def _load(*, ready: float = 1.0, seconds: float = 1.0, host: int = 0) -> Load:
    return Load(
        seconds=seconds,
        ready=ready,
        phases={"load": (0.0, seconds)},
        host=host,
        pinned=0,
        device=0,
        held=0,
        bytes_read=0,
        late_imports=0,
    )


def _outcome(**values: Any) -> Outcome:
    return Outcome(**{"way": "sharded", "turn": 0, "rank": 0, **values})


def _options(**values: Any) -> Options:
    return Options(**{"checkpoint": Path("model"), "ways": ("sharded", "seed"), **values})


def test_a_turn_is_ready_when_its_last_rank_is_and_turns_give_their_median() -> None:
    outcomes = [
        _outcome(turn=turn, rank=rank, load=_load(ready=ready + rank, host=rank))
        for turn, ready in enumerate((5.0, 1.0, 3.0))
        for rank in (0, 1)
    ]
    summary = summarize("sharded", outcomes)
    assert summary.ready == (6.0, 2.0, 4.0)
    assert summary.seconds == 4.0
    assert summary.hosts == (0, 1)


def test_phases_are_those_of_the_slowest_rank() -> None:
    outcomes = [_outcome(rank=rank, load=_load(seconds=seconds)) for rank, seconds in enumerate((2.0, 3.0))]
    assert summarize("sharded", outcomes).phases == {"load": 3.0}


def test_the_first_step_is_told_apart_and_losses_are_averaged_over_ranks() -> None:
    outcomes = [
        _outcome(rank=rank, load=_load(), training=Training(losses=[loss], seconds=[9.0, 1.0, 3.0, 2.0], device=0))
        for rank, loss in enumerate((1.0, 2.0))
    ]
    summary = summarize("sharded", outcomes)
    assert (summary.first_step, summary.median_step, summary.losses) == (9.0, 2.0, (1.5,))


def test_what_a_rank_says_comes_before_that_torchrun_has_ended() -> None:
    outcomes = [_outcome(rank=0, error="torchrun ended with 1"), _outcome(rank=1, error="out of memory")]
    assert summarize("sharded", outcomes).error == "out of memory"


@pytest.mark.parametrize(("error", "complete"), [("out of memory", True), ("KeyError: 'x'", False)])
def test_want_of_memory_is_a_result_and_another_failure_is_none(error: str, complete: bool) -> None:
    outcomes = (_outcome(load=_load()), _outcome(way="seed", error=error))
    results = Results(options=_options(), environment={}, outcomes=outcomes)
    assert results.is_complete is complete
    assert f"| seed | {error} |" in results.markdown()
    texts = [element.text for element in fromstring(chart(results.summaries())).iter() if element.tag.endswith("text")]
    assert error.split(":", maxsplit=1)[0] in texts


def test_a_journal_keeps_the_latest_outcome_of_a_turn(tmp_path: Path) -> None:
    journal = Journal(folder=tmp_path, rank=0)
    last = _outcome(load=_load(), training=Training(losses=[1.0], seconds=[1.0], device=0))
    for outcome in (_outcome(turn=1), _outcome(load=_load()), last):
        journal.add(outcome)
    assert collect(tmp_path) == [_outcome(turn=1), last]


def test_options_survive_their_way_through_a_command_line() -> None:
    options = _options(
        repeats=3, steps=0, length=64, activation_checkpointing=True, memory_cap=24.0, seed_threads=2, profile=Path("p")
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert Options.of(parser.parse_args(options.arguments())) == options


def test_an_unknown_way_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"expected some of read, sharded.*found shardde"):
        _options(ways=("shardde",))


def test_a_way_that_is_named_twice_has_one_summary_of_both_turns() -> None:
    steps = ([9.0, 1.0], [7.0, 3.0])
    outcomes = tuple(
        _outcome(turn=turn, load=_load(), training=Training(losses=[1.0 + turn], seconds=seconds, device=0))
        for turn, seconds in enumerate(steps)
    )
    results = Results(options=_options(ways=("sharded", "seed", "sharded")), environment={}, outcomes=outcomes)
    (summary,) = results.summaries()
    assert (summary.first_step, summary.median_step, summary.losses) == (8.0, 2.0, (1.0,))
