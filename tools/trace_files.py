"""List our files that run while two ranks load a model under FSDP2, and those on the path of one weight.

The path of a weight: every function that the passes call while they handle it (its entry in the checkpoint, its
target, its shard buffer, its batch), from reading its bytes until it is in the model. Files of `comm` and `telemetry`
serve all weights alike, and are listed separately.

Run it as: python tools/trace_files.py [--weight NAME]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
WEIGHT = "model.layers.0.mlp.up_proj.weight"

#: Packages that do not handle weights.
PLUMBING = ("comm", "telemetry")


def main() -> int:
    """Print the two lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", default=WEIGHT, help="FQN of the weight to follow")
    weight = parser.parse_args().weight
    ran, way = traced(weight)
    print(f"{len(ran)} files of surgery ran while two ranks loaded a model under FSDP2.")
    print(f"\nThe way of {weight}, {len(way)} files:")
    print(*(f"  {name}" for name in way), sep="\n")
    print("\nBeside it, for all weights alike:")
    print(*(f"  {name}" for name in ran if room(name) in PLUMBING), sep="\n")
    return 0


def traced(weight: str = WEIGHT) -> tuple[list[str], list[str]]:
    """Trace a load; returns `(files that ran, files on the path of weight)` on rank 0 of two, relative to `surgery`."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        ranks = [context.Process(target=load, args=(rank, Path(folder), weight, results)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found: tuple[list[str], list[str]] = results.get()
        for rank in ranks:
            rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"a rank has failed: exit codes {[rank.exitcode for rank in ranks]}")
    return found


def room(name: str) -> str:
    """The package of a file within `surgery`."""
    return name.partition("/")[0]


def load(rank: int, folder: Path, weight: str, results: Any) -> None:
    """Load a tiny model on one of two ranks; rank 0 traces itself."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    import surgery

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank == 0:
        sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=96, **sizes))
        model.to(torch.bfloat16).save_pretrained(folder / "model")
    dist.barrier()
    tracer = Tracer(weight)
    trace = tracer.record if rank == 0 else None
    threading.setprofile(trace)
    sys.setprofile(trace)
    surgery.release(surgery.qlora(folder / "model", shard=surgery.FSDP2(), report=surgery.Report()))
    threading.setprofile(None)
    sys.setprofile(None)
    if rank == 0:
        results.put((sorted(tracer.ran), sorted(tracer.path)))
    dist.barrier()
    dist.destroy_process_group()


class Tracer:
    """Recorder of our files in which functions are called. path: the files on the path of one weight."""

    def __init__(self, weight: str) -> None:
        self.weight = weight
        self.ran: set[str] = set()
        self.path: set[str] = set()
        self._holders: set[FrameType] = set()

    def record(self, frame: FrameType, event: str, _argument: object) -> None:
        """Profile function, called by the interpreter."""
        code = frame.f_code
        if event == "return":
            self._holders.discard(frame)
        if event != "call" or not code.co_filename.startswith(f"{ROOT}/surgery/") or "<" in code.co_name:
            return
        name = code.co_filename.removeprefix(f"{ROOT}/surgery/")
        self.ran.add(name)
        given = [frame.f_locals.get(each) for each in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if room(name) == "passes" and any(map(self._holds_weight, given)):
            self._holders.add(frame)
        if room(name) not in PLUMBING and self._is_called_by_holder(frame):
            self.path.add(name)

    def _is_called_by_holder(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame in self._holders:
                return True
            frame = frame.f_back
        return False

    def _holds_weight(self, value: object) -> bool:
        """Whether `value` is the weight in one of its forms, or a batch that contains it."""
        target = getattr(value, "target", value)
        entry = getattr(value, "entry", value)
        named = getattr(target, "fqn", None), getattr(entry, "name", None)
        batch = getattr(value, "targets", ()) if type(value).__name__ == "Batch" else ()
        return self.weight in named or any(each.fqn == self.weight for each in batch)


if __name__ == "__main__":
    sys.exit(main())
