"""Start a process for every rank of every way, and give them turns: one plays, the others hold still.

So ways alternate within one run, each has loaded once, and none changes what another one runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from loading.batches import Batch
from loading.launch import ROOT, environment_of
from step.found import Found
from step.options import Options, Way

__all__ = ["Plan", "perform"]

SCRIPT = ROOT / "tools" / "bench_step.py"

#: Lines of a log to print for a way that failed.
LOG_LINES = 25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything to measure, and within which limits.

    ranks: processes of a way that does not say itself. steps: of a turn; repeats: turns of each way on each batch.
    longest: find the longest sequence up to so many tokens, after all batches. turn_limit: seconds for one command.
    limit: seconds for all, after which no other turn begins. logs: a folder for what the processes print.
    """

    checkpoint: Path
    ways: tuple[str, ...]
    ranks: int
    batches: tuple[str, ...]
    steps: int
    repeats: int
    longest: int | None
    device: str
    memory_cap: float | None
    turn_limit: float
    limit: float
    logs: Path


def perform(plan: Plan, save: Callable[[list[Found]], None]) -> list[Found]:
    """Measure all ways; `save` is handed all that has been found after each turn."""
    # `timeout` sends SIGTERM; an exit through `finally` ends the children too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    until = time.monotonic() + plan.limit
    found: dict[tuple[_Player, str | None], Found] = {}
    with _players(plan) as players:
        for player in players:
            player.begin(plan)
        for player in players:
            player.tell(plan, {"do": "load"}, player.found)
            _print(player.found, until)
            if player.found.error is not None:
                found[player, None] = player.found
        for player, command, batch in _turns(plan, players):
            if player.found.error is None and time.monotonic() < until:
                mine = found.setdefault((player, batch), player.blank(batch))
                player.tell(plan, command, mine)
                _print(mine, until)
                save(list(found.values()))
    return list(found.values())


def _print(found: Found, until: float) -> None:
    print(f"{until - time.monotonic():4.0f} s left: {found.label} {found.batch or ''} {_outcome(found)}", flush=True)


def _outcome(found: Found) -> str:
    if found.error is not None:
        return f"FAILED: {found.error}"
    if found.longest is not None:
        return f"{found.longest} tokens"
    if found.turns:
        return f"{found.step:.4f} s a step, peak {found.peak / 2**30:.2f} GiB, loss {found.losses[-1]:.5f}"
    return f"ready in {found.ready:.1f} s"


def _turns(plan: Plan, players: Sequence[_Player]) -> Iterator[tuple[_Player, dict[str, Any], str | None]]:
    """Commands in their order: of a batch, all ways in turn, and again."""
    for batch in plan.batches:
        for turn in range(plan.repeats):
            profile = turn == plan.repeats - 1
            for player in players:
                yield player, {"do": "train", "batch": batch, "steps": plan.steps, "profile": profile}, batch
    if plan.longest is not None:
        for player in players:
            yield player, {"do": "longest", "most": plan.longest}, None


@dataclass(kw_only=True)
class _Rank:
    """A process, and the connection to it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path


@dataclass(kw_only=True, eq=False)
class _Player:
    """The processes of one way. found: what is known of it beside batches."""

    name: str
    found: Found
    ranks: list[_Rank] = field(default_factory=list)

    def blank(self, batch: str | None) -> Found:
        """Record of a batch before its first turn, with all that is known of the way."""
        values = asdict(self.found) | {"batch": batch}
        return Found(**values)

    def begin(self, plan: Plan) -> None:
        """Wait until all ranks have imported what they need."""
        answers = self._answers(plan, self.found)
        if answers is not None:
            self.found.environment = answers[0]["environment"]

    def tell(self, plan: Plan, command: dict[str, Any], found: Found) -> None:
        """Give a command to all ranks, and add their answers to `found`."""
        if found.error is not None:
            return
        try:
            for rank in self.ranks:
                rank.connection.send(command)
        except OSError:
            self._fail(found, "ended without a word")
            return
        answers = self._answers(plan, found)
        if answers is None:
            return
        error = found.add(answers)
        if error is not None and len(self.ranks) > 1:
            self._fail(found, error)  # ranks may be out of step from now on
        elif error is not None:
            self._print_log()

    def _answers(self, plan: Plan, found: Found) -> list[dict[str, Any]] | None:
        """The answers of all ranks; None when one has ended, failed alone, or taken too long: all are ended then."""
        until = time.monotonic() + plan.turn_limit
        answers: dict[int, dict[str, Any]] = {}
        waiting = {rank.connection: number for number, rank in enumerate(self.ranks)}
        while waiting:
            ready = wait_for(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                self._fail(found, f"stopped after {plan.turn_limit:g} s")
                return None
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    self._fail(found, "ended without a word")
                    return None
                answers[waiting.pop(connection)] = answer
                if "error" in answer and waiting:
                    self._fail(found, answer["error"])
                    return None
        return [answers[number] for number in range(len(self.ranks))]

    def _fail(self, found: Found, error: str) -> None:
        self.found.error = found.error = error
        self._print_log()
        self.end()

    def _print_log(self) -> None:
        for rank in self.ranks[:2]:
            lines = rank.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-LOG_LINES:]), file=sys.stderr, flush=True)

    def end(self) -> None:
        """End all processes of this way, and what they have started."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
            rank.connection.close()
        self.ranks = []


@contextmanager
def _players(plan: Plan) -> Iterator[list[_Player]]:
    """Start the processes of all ways; on leaving, all have ended."""
    plan.logs.mkdir(parents=True, exist_ok=True)
    players: list[_Player] = []
    try:
        for name in plan.ways:
            players.append(_start(plan, name, players))
        yield players
    finally:
        for player in players:
            player.end()


def _start(plan: Plan, name: str, before: Sequence[_Player]) -> _Player:
    way = Way.of(name)
    size = way.processes(plan.ranks)
    player = _Player(name=str(way), found=Found(way=str(way), ranks=size, batch=None, memory_cap=plan.memory_cap))
    options = Options(
        checkpoint=str(plan.checkpoint.resolve()),
        way=str(way),
        device=plan.device,
        tokens=max(plan.longest or 0, *(Batch.of(batch).tokens for batch in plan.batches)),
        memory_cap=plan.memory_cap,
    )
    port = _free_port()
    for rank in range(size):
        own, theirs = Pipe()
        log = plan.logs / f"{len(before)}-{_in_file_name(name)}-{rank}.log"
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    str(SCRIPT),
                    "play",
                    str(theirs.fileno()),
                    json.dumps(asdict(options)),
                ],
                env=_environment(plan, way, rank=rank, size=size, port=port),
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        player.ranks.append(_Rank(process=process, connection=own, log=log))
    return player


def _in_file_name(name: str) -> str:
    """The name of a way as part of a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _environment(plan: Plan, way: Way, *, rank: int, size: int, port: int) -> dict[str, str]:
    values = environment_of(size, plan.device) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    values |= {"PYTHONUNBUFFERED": "1"}
    if size == 1:
        if plan.device == "cuda" and "balanced" not in way.options:
            values["CUDA_VISIBLE_DEVICES"] = values.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return values
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return values | {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
