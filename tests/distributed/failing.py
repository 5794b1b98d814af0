"""Ranks that fail while a model is built, each at another place, and what the others make of it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

import surgery
from surgery.checkpoint import Checkpoint, Reader

__all__ = ["FAILURES", "EndedError", "build_or_fail"]

#: The fourth tensor is in the middle of the first decoder block.
BEFORE_FAILING = 3


class EndedError(Exception):
    """What `surgery.qlora` raised, as text with what was left active; never caught."""


def _torn_config(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type":')
    return folder


def _truncated_after_validation(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    largest = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 2000)
    return checkpoint


def _at_the_fourth_read(act: Callable[[], Any]) -> None:
    stock, reads = Reader.read_into, []

    def read_into(reader: Reader, tensor: Any, out: Any, **where: int) -> None:
        reads.append(tensor)
        if len(reads) > BEFORE_FAILING:
            act()
        stock(reader, tensor, out, **where)

    Reader.read_into = read_into  # type: ignore[method-assign]  # of this process alone


def _raise(error: BaseException) -> Any:
    raise error


def _memory_runs_out_in_load(folder: Path) -> Path:
    _at_the_fourth_read(lambda: _raise(MemoryError("no memory left to read into")))
    return folder


def _killed_in_load(folder: Path) -> Path:
    _at_the_fourth_read(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return folder


def _fails_in_adapt(folder: Path) -> Path:
    import peft
    from transformers import PreTrainedModel

    stock = peft.get_peft_model

    def get_peft_model(model: Any, *args: Any, **options: Any) -> Any:
        # A probe adapts a specimen of its own with it.
        return _raise(OSError("no disk")) if isinstance(model, PreTrainedModel) else stock(model, *args, **options)

    peft.get_peft_model = get_peft_model
    return folder


def _fails_to_patch(folder: Path) -> Path:
    import peft

    peft.get_peft_model = lambda *args, **options: _raise(OSError("no disk"))
    return folder


def _fails_in_shard(folder: Path) -> Path:
    from surgery.passes import shard

    shard.wrap = lambda *args, **kwargs: _raise(MemoryError("no memory left to shard"))  # type: ignore[assignment]
    return folder


#: What happens to the rank that fails: it may spoil its own copy of the checkpoint, or open it in advance.
FAILURES: dict[str, Callable[[Path], Path | Checkpoint]] = {
    "skeleton": _torn_config,
    "load-truncated": _truncated_after_validation,
    "load-memory": _memory_runs_out_in_load,
    "load-killed": _killed_in_load,
    "patch": _fails_to_patch,
    "adapt": _fails_in_adapt,
    "shard": _fails_in_shard,
}


def build_or_fail(checkpoint: Path, scratch: Path, failure: str, failing: int, goes_on: bool) -> str:
    """What `qlora` raised here, as text. Unless the rank `goes_on`, its process ends by that instead."""
    from peft import LoraConfig

    import patches

    source: Path | Checkpoint = scratch / f"rank{dist.get_rank()}"
    shutil.copytree(checkpoint, source)
    if dist.get_rank() == failing:
        source = FAILURES[failure](source)
    try:
        surgery.qlora(
            source,
            lora=LoraConfig(r=2, target_modules="all-linear"),
            shard=surgery.FSDP1(),
            report=surgery.Report(),
        )
    except (surgery.SurgeryError, patches.PatchError) as error:
        active = [receipt.id for receipt in patches.active()]
        ended = f"{type(error).__name__}: {error}; rank {getattr(error, 'rank', '-')}; active {active}"
        if goes_on:
            return ended
        raise EndedError(ended) from error
    raise AssertionError("nothing failed")
