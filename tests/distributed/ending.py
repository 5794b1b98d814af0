"""Ranks that end in the middle of a job, each at another place, and what the others make of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from trl import SFTTrainer

import patches
import surgery
from surgery.comm import heartbeat
from surgery.finetune import job
from surgery.finetune.parser import parse

__all__ = ["ENDS", "PLACES", "EndedError", "end", "end_in_attest"]


class EndedError(Exception):
    """What the job raised, as text with the number of the rank and what was left active; never caught."""


def _at_call(owner: object, name: str, number: int) -> Callable[[pytest.MonkeyPatch, Callable[[], None]], None]:
    """Do something at that call of a function, the first being 1."""

    def install(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
        stock, calls = getattr(owner, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                act()
            return stock(*args, **kwargs)

        patch.setattr(owner, name, call)

    return install


#: Where a rank ends. Evaluation comes first and has 2 samples; then 3 steps of 4 micro-batches follow.
PLACES: dict[str, Callable[[pytest.MonkeyPatch, Callable[[], None]], None]] = {
    "evaluation": _at_call(SFTTrainer, "prediction_step", 1),
    "training": _at_call(SFTTrainer, "training_step", 7),
    "optimizer": _at_call(torch.optim.AdamW, "step", 2),
    "saving": _at_call(job, "save_adapter", 1),
}


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise_memory_error() -> None:
    raise MemoryError("no memory left")


def _interrupted() -> None:
    raise KeyboardInterrupt


ENDS = {"killed": _killed, "fails": _raise_memory_error, "interrupted": _interrupted}


def end(told: Sequence[str], place: str, how: str, ending: int) -> None:
    """Run a job in which the rank `ending` ends; raises `EndedError` on the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat, "MISSED", 4)
        if dist.get_rank() == ending:
            PLACES[place](patch, ENDS[how])
        try:
            job.run(parse(told), console=Console(file=StringIO()))
        except (surgery.SurgeryError, MemoryError, KeyboardInterrupt) as error:
            active = [receipt.id for receipt in patches.active()]
            text = f"{type(error).__name__}: {error}; rank {getattr(error, 'rank', '-')}; active {active}"
            raise EndedError(text) from error
    raise AssertionError("nothing ended")


def end_in_attest(checkpoint: Path) -> None:
    """Build a model; then rank 1 is killed where the other attests it."""
    heartbeat.MISSED = 4
    model = surgery.qlora(checkpoint, shard=surgery.FSDP2(), report=surgery.Report())
    if dist.get_rank() == 1:
        _killed()
    try:
        surgery.attest(model)
    except surgery.PeerError as error:
        raise EndedError(f"PeerError: {error}; rank {error.rank}") from error
    raise AssertionError("nothing ended")
