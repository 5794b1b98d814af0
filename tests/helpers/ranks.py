"""Run a function on N ranks: real processes, a real gloo process group, results and failures brought back."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

#: Imported once by the fork server, so that a rank starts in milliseconds and not in ten seconds.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "bitsandbytes",
    "transformers",
    "peft",
    "accelerate",
    "surgery.finetune.job",
    "tests.helpers.preloaded",
]


class RanksFailedError(AssertionError):
    """At least one rank raised, died, or did not finish; the message has every traceback there is."""


@dataclass(frozen=True)
class Outcome:
    """What one rank did: its result, or the traceback of what it raised; `seconds` after which it was done."""

    result: Any = None
    failure: str | None = None
    seconds: float = 0.0


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on every rank; the results by rank. Raises `RanksFailedError` unless all return."""
    outcomes = try_ranks(function, world_size, *args, timeout=timeout)
    failures = [f"--- rank {rank} ---\n{o.failure}" for rank, o in enumerate(outcomes) if o.failure]
    if failures:
        raise RanksFailedError("\n".join(failures))
    return [outcome.result for outcome in outcomes]


def try_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Outcome]:
    """Like `run_ranks`, but failures are outcomes too. Processes still running after `timeout` seconds are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    start = time.monotonic()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank_main, args=(function, args, rank, (world_size, port), sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes], start, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(receivers: list[Connection], start: float, timeout: float) -> list[Outcome]:
    outcomes: dict[Connection, Outcome] = {}
    while len(outcomes) < len(receivers):
        left = start + timeout - time.monotonic()
        open_ones = [receiver for receiver in receivers if receiver not in outcomes]
        ready = wait(open_ones, timeout=max(left, 0))
        seconds = time.monotonic() - start
        if not ready:
            break
        for receiver in [each for each in open_ones if each in ready]:
            try:
                result, failure = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
            except EOFError:
                result, failure = None, "the process ended without a result"
            outcomes[receiver] = Outcome(result, failure, seconds)
    hung = Outcome(failure=f"still running after {timeout} s", seconds=timeout)
    return [outcomes.get(receiver, hung) for receiver in receivers]


def _rank_main(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: tuple[int, int], sender: Connection
) -> None:
    """`world` is the world size, and the port where rank 0 listens."""
    world_size, port = world
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        _send(sender, (result, None))
    except BaseException:  # noqa: BLE001  # brought back to the test, whatever it is
        _send(sender, (None, traceback.format_exc()))


def _send(sender: Connection, outcome: tuple[Any, str | None]) -> None:
    """By value: tensors that travel by shared memory need their sender to live on."""
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    sender.send_bytes(buffer.getvalue())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
