"""Start torchrun for the turns of a benchmark, and collect the outcomes that its ranks have written."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from loading.options import Options, cores_per_rank
from loading.outcome import Outcome, collect
from loading.results import Results, environment

__all__ = ["ROOT", "compare", "environment_of", "wait"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench_load.py"

#: Seconds within which torchrun ends its ranks: it terminates them, and kills them after 30.
SHUTDOWN_LIMIT = 60

#: Number of log lines to print for a run that failed.
LOG_LINES = 12


def compare(options: Options, parsed: argparse.Namespace) -> Results:
    """Run all turns of all ways, alternating ways, each in new processes unless `parsed.together`."""
    # `timeout` sends SIGTERM; an exit through `finally` ends the children too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    starts = [options] if parsed.together else list(_single_turns(options))
    outcomes: list[Outcome] = []
    turns: dict[str, int] = {}
    for start in starts:
        found = _start(start, ranks=parsed.ranks, limit=parsed.limit)
        if not parsed.together:
            turn = turns.setdefault(start.ways[0], 0)
            turns[start.ways[0]] += 1
            found = [replace(outcome, turn=turn) for outcome in found]
        outcomes += found
        Results(options=options, environment={}, outcomes=tuple(outcomes)).write(json_file=parsed.json)
    return Results(options=options, environment=environment(options, ranks=parsed.ranks), outcomes=tuple(outcomes))


def _single_turns(options: Options) -> Iterator[Options]:
    """Split options into one turn of one way each, with training in the last turn alone."""
    for turn in range(options.repeats):
        is_last = turn == options.repeats - 1
        for way in options.ways:
            yield replace(options, ways=(way,), repeats=1, steps=options.steps if is_last else 0)


def _start(options: Options, *, ranks: int, limit: int) -> list[Outcome]:
    print(f"{', '.join(options.ways)}: {ranks} ranks", file=sys.stderr, flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as into:
        log = Path(into, "log")
        with log.open("w", encoding="utf-8") as stream:
            child = subprocess.Popen(
                [*torchrun, str(SCRIPT), "run", "--into", into, *options.arguments()],
                env=environment_of(ranks, options.device),
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            failure = wait(child, limit)
        found = collect(Path(into))
        if failure is not None:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            print("\n".join(tail), file=sys.stderr)
            found = [_interrupted(outcome, options, failure) for outcome in found]
        return [*found, *_missing_outcomes(options, found, ranks, failure or "ended without a word")]


def wait(child: subprocess.Popen[bytes], limit: int) -> str | None:
    """Wait for the child; returns the failure, or None. On return, the child and all its processes have ended."""
    try:
        code = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit} s"
    finally:
        # torchrun ends its ranks, which are neither our children nor in its process group.
        child.terminate()
        child.wait(timeout=SHUTDOWN_LIMIT)
    return f"torchrun ended with {code}" if code else None


def _interrupted(outcome: Outcome, options: Options, failure: str) -> Outcome:
    """Mark an outcome as failed if the rank has loaded but was stopped before it had trained."""
    in_last_round = outcome.turn // max(options.ways.count(outcome.way), 1) == options.repeats - 1
    was_to_train = options.steps > 0 and in_last_round and outcome.way != "read"
    if outcome.error is None and outcome.training is None and was_to_train:
        return replace(outcome, error=failure)
    return outcome


def _missing_outcomes(options: Options, found: list[Outcome], ranks: int, failure: str) -> Iterator[Outcome]:
    """Outcomes for ranks that have written none, because another one has failed or all were stopped."""
    known = {(outcome.way, outcome.rank) for outcome in found}
    for way in options.ways:
        for rank in range(ranks):
            if (way, rank) not in known:
                yield Outcome(way=way, turn=0, rank=rank, error=failure)


def environment_of(ranks: int, device: str) -> dict[str, str]:
    """The environment of a rank, with its share of cores. On CPUs, spinning threads would block those they wait for."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    values = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(cores_per_rank(ranks))}
    if device == "cpu":
        values |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    return values
