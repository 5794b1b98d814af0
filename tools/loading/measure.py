"""Measure one turn of one way, on this rank."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from loading.case import Case, Trainee
from loading.options import Options
from loading.outcome import Journal, Load, Outcome, Training, describe
from loading.profiling import profile
from loading.ways import LOADERS
from loading.world import World
from surgery.telemetry.report import Report

__all__ = ["measure_all"]

#: Name of the phase around all others.
READY = "ready"


def measure_all(options: Options, world: World, journal: Journal) -> None:
    """Measure the ways in turn, `repeats` times, with training in the last round. A way may be named several times."""
    turns: Counter[str] = Counter()
    for round_ in range(options.repeats):
        is_last = round_ == options.repeats - 1
        for way in options.ways:
            outcome = _attempt(way, turns[way], options, world, journal, train=is_last and options.steps > 0)
            turns[way] += 1
            world.clear()
            # A rank that has failed arrives here at once; one that waits for it in a collective never does.
            if world.any(outcome.error is not None) and world.rank == 0:
                print(f"{way}: {outcome.error or 'failed on another rank'}", file=sys.stderr, flush=True)


def _attempt(way: str, turn: int, options: Options, world: World, journal: Journal, *, train: bool) -> Outcome:
    """Run one turn; writes the outcome to the journal as it comes, since the process may die."""
    outcome = Outcome(way=way, turn=turn, rank=world.rank)
    try:
        load, trainee = _load(LOADERS[way], options, world)
        outcome = Outcome(way=way, turn=turn, rank=world.rank, load=load)
        journal.add(outcome)
        if trainee is None:
            return outcome
        try:
            training = _train(way, trainee, options, world) if train else None
        finally:
            trainee.close()
        outcome = Outcome(way=way, turn=turn, rank=world.rank, load=load, training=training)
    except Exception as error:  # noqa: BLE001  # any error is a result, and the next way has its turn
        outcome = Outcome(way=way, turn=turn, rank=world.rank, load=outcome.load, error=describe(error))
    journal.add(outcome)
    return outcome


def _load(loader: Callable[[Case], Trainee | None], options: Options, world: World) -> tuple[Load, Trainee | None]:
    world.clear()
    report = Report(device=world.device)
    modules = len(sys.modules)
    world.meet()
    start = time.perf_counter()
    # In a separate group around the way's own phases, so that memory between those counts too.
    with report.phase(READY, group=READY):
        trainee = loader(Case(options=options, world=world, report=report))
        world.synchronize()
        seconds = time.perf_counter() - start
        world.meet()
        ready = time.perf_counter() - start
    whole = report.phases[-1]
    return Load(
        seconds=round(seconds, 3),
        ready=round(ready, 3),
        phases={
            name: (round(phase["start"] - whole.start, 3), phase["seconds"])
            for name, phase in report.as_dict().items()
            if name != READY
        },
        host=whole.host_peak - whole.host_before,
        pinned=_pinned_peak(world),
        device=whole.device_peak,
        held=torch.cuda.memory_allocated(world.device) if world.on_cuda else 0,
        bytes_read=report.bytes_read,
        late_imports=len(sys.modules) - modules,
    ), trainee


def _pinned_peak(world: World) -> int:
    if not world.on_cuda:
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def _train(way: str, trainee: Trainee, options: Options, world: World) -> Training:
    losses, seconds = [], []
    if world.on_cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    for _ in range(options.steps):
        world.meet()
        start = time.perf_counter()
        losses.append(trainee.step())
        world.synchronize()
        seconds.append(round(time.perf_counter() - start, 4))
    peak = torch.cuda.max_memory_allocated(world.device) if world.on_cuda else 0
    if options.profile is not None:
        _profile(way, trainee, options.profile, world)
    return Training(losses=losses, seconds=seconds, device=peak)


def _profile(way: str, trainee: Trainee, folder: Path, world: World) -> None:
    """Profile steps on all ranks; rank 0 writes its own profile."""
    text = profile(trainee.step, synchronize=world.synchronize, device=world.device)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{way}.txt").write_text(text, encoding="utf-8")
