"""Ranks that fail while a model is built, each at another place, and what the others make of it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import surgery
from surgery.checkpoint import Checkpoint, Reader, TensorEntry
from surgery.comm import heartbeat
from tests.distributed.loads import in_small_steps

__all__ = ["FAILURES", "EndedError", "all_fail", "build_or_fail", "fail"]

#: The fourth tensor is in the middle of the first decoder block.
BEFORE_FAILING = 3

SHARDS: dict[str, Callable[[], Any]] = {"fsdp1": surgery.FSDP1, "fsdp2": surgery.FSDP2}


class EndedError(Exception):
    """What `surgery.qlora` raised, as text with what was left active; never caught."""


def _torn_config(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    (folder / "config.json").write_text('{"model_type":')
    return folder


def _at_the_fourth_read(patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    stock, seen = Reader.read_bytes, set()

    def read_bytes(reader: Reader, entry: TensorEntry, out: memoryview, **where: int) -> None:
        seen.add(entry.name)
        if len(seen) > BEFORE_FAILING:
            act()
        stock(reader, entry, out, **where)

    patch.setattr(Reader, "read_bytes", read_bytes)


def _raise(error: BaseException) -> Any:
    raise error


def _truncated_in_load(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    largest = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    _at_the_fourth_read(patch, lambda: os.truncate(largest, 2000))
    return folder


def _changed_in_load(folder: Path, patch: pytest.MonkeyPatch) -> Checkpoint:
    """A value in a file that was read from already: nothing but its time tells."""
    for file in folder.glob("*.safetensors"):
        os.utime(file, (0, 0))
    checkpoint = Checkpoint.open(folder)

    def write() -> None:
        with checkpoint.entry("model.embed_tokens.weight").file.open("r+b") as stream:
            stream.seek(-2, os.SEEK_END)
            stream.write(b"\0\0")

    _at_the_fourth_read(patch, write)
    return checkpoint


def _memory_runs_out_in_load(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    _at_the_fourth_read(patch, lambda: _raise(MemoryError("no memory left to read into")))
    return folder


def _killed_in_load(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    _at_the_fourth_read(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return folder


def _memory_runs_out_in_exchange(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Of the fourth weight, when the statistics of the third have gone round."""
    from surgery.quantizers.bnb import Bnb4bit

    stock, seen = Bnb4bit.states, []

    def states(quant: Bnb4bit, statistics: list[Any], shapes: list[Any], dtypes: list[Any]) -> Any:
        seen.extend(shapes)
        if len(seen) > BEFORE_FAILING:
            raise MemoryError("no memory left for statistics")
        return stock(quant, statistics, shapes, dtypes)

    patch.setattr(Bnb4bit, "states", states)
    return folder


def _fails_in_relocate(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    from surgery.passes.relocate import Relocate

    patch.setattr(Relocate, "_move", lambda *args: _raise(MemoryError("no memory left to relocate")))
    return folder


def _in_adapt(patch: pytest.MonkeyPatch, error: BaseException, *, probe: bool = False) -> None:
    """Where the model is adapted, or where a probe adapts a specimen of its own."""
    import peft
    from transformers import PreTrainedModel

    stock = peft.get_peft_model

    def get_peft_model(model: Any, *args: Any, **options: Any) -> Any:
        fails = not isinstance(model, PreTrainedModel) if probe else getattr(model, "is_loaded_in_4bit", False)
        return _raise(error) if fails else stock(model, *args, **options)  # a rehearsal adapts a copy before

    patch.setattr(peft, "get_peft_model", get_peft_model)


def _fails_in_adapt(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    _in_adapt(patch, OSError("no disk"))
    return folder


def _interrupted_in_adapt(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    _in_adapt(patch, KeyboardInterrupt())
    return folder


def _fails_to_patch(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    _in_adapt(patch, OSError("no disk"), probe=True)
    return folder


def _fails_to_install(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    from surgery.passes import install

    patch.setattr(install, "install", lambda *args: _raise(MemoryError("no memory left to install")))
    return folder


def _fails_in_shard(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    from surgery.sharding import fsdp1, fsdp2

    for owner, name in ((fsdp1, "wrap"), (fsdp2, "shard")):
        patch.setattr(owner, name, lambda *args, **kwargs: _raise(MemoryError("no memory left to shard")))
    return folder


#: What happens to the rank that fails: it may spoil its own copy of the checkpoint, or open it in advance.
FAILURES: dict[str, Callable[[Path, pytest.MonkeyPatch], Path | Checkpoint]] = {
    "skeleton": _torn_config,
    "load-truncated": _truncated_in_load,
    "load-changed": _changed_in_load,
    "load-memory": _memory_runs_out_in_load,
    "load-killed": _killed_in_load,
    "exchange": _memory_runs_out_in_exchange,
    "relocate": _fails_in_relocate,
    "patch": _fails_to_patch,
    "adapt": _fails_in_adapt,
    "interrupt": _interrupted_in_adapt,
    "install": _fails_to_install,
    "shard": _fails_in_shard,
}


def build_or_fail(checkpoint: Path, scratch: Path, failure: str, failing: int, sharding: str) -> str:
    """What `qlora` raised here, as text; with the rank of a `PeerError`, active patches, and threads left behind."""
    from peft import LoraConfig

    import patches

    source: Path | Checkpoint = scratch / f"{failure}-rank{dist.get_rank()}"
    shutil.copytree(checkpoint, source)
    with pytest.MonkeyPatch.context() as patch:
        in_small_steps(patch)
        patch.setattr(heartbeat, "SILENCE", 8)  # ranks are missed sooner
        if dist.get_rank() == failing:
            source = FAILURES[failure](source, patch)
        try:
            surgery.qlora(
                source,
                lora=LoraConfig(r=2, target_modules="all-linear"),
                shard=SHARDS[sharding](),
                report=surgery.Report(),
            )
        except (surgery.SurgeryError, patches.PatchError, KeyboardInterrupt) as error:
            active = [receipt.id for receipt in patches.active()]
            threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("surgery")]
            rank = getattr(error, "rank", "-")
            return f"{type(error).__name__}: {error}; rank {rank}; active {active}; threads {threads}"
    raise AssertionError("nothing failed")


def fail(*args: Any) -> None:
    """End this process by what `build_or_fail` tells of."""
    raise EndedError(build_or_fail(*args))


def all_fail(checkpoint: Path, scratch: Path, failures: tuple[str, ...], failing: int, sharding: str) -> dict[str, str]:
    """One failure after the other, in one process group, which has to be whole after each."""
    said = {}
    for failure in failures:
        said[failure] = build_or_fail(checkpoint, scratch, failure, failing, sharding)
        dist.barrier()
    return said
