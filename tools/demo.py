"""Quantize a real model, fine-tune it on two CPU ranks, kill and resume that, merge the adapter, and use the result.

    python tools/demo.py MODEL TRAIN.jsonl HELD_OUT.jsonl OUTPUT

All processes of the training are killed once the first checkpoint is there; the same command with one more word goes on
from it. The adapter is then evaluated in a process that uses PEFT alone, and merged into the 16-bit model, which
answers a question. Exits with 1 unless the held-out loss falls, no patch is left active, and adapter and merged model
do as well as the 4-bit model that was trained on.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

RANKS = 2
MAX_LENGTH = 256

STEPS, SAVED = 12, 6

#: Options of `surgery finetune`; 4 samples per step over both ranks.
TRAINING = {
    "--max-steps": str(STEPS),
    "--save-steps": str(SAVED),
    "--per-device-train-batch-size": "2",
    "--gradient-accumulation-steps": "1",
    "--gradient-checkpointing": "false",
    "--learning-rate": "1e-3",
    "--max-length": str(MAX_LENGTH),
}

#: Tolerance of the adapter's loss on the unquantized model, against that in training. Without an adapter, 4 bits cost
#: a model this small 0.33; training makes up for most of that, and 0.07 remains.
TOLERANCE = 0.15

#: Tolerance of the losses on weights rounded to 4 bits, against those in training.
ROUNDED_TOLERANCE = 0.01

#: Tolerance of the merged model's loss, whose weights are bfloat16, against the adapter's beside the same weights.
MERGED_TOLERANCE = 0.02

RELOAD = Path(__file__).with_name("demo_reload.py")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean token losses on the held-out text, without and with the adapter."""

    base: float
    adapter: float

    @classmethod
    def of(cls, evaluations: list[dict[str, float]]) -> Losses:
        """Take the losses from a summary's evaluations: the first is before training, the last after it."""
        return cls(base=evaluations[0]["loss"], adapter=evaluations[-1]["loss"])

    def is_within(self, tolerance: float, *, of: Losses) -> bool:
        """Whether both losses are at most `tolerance` away from those of `of`; False for NaN."""
        return abs(self.base - of.base) <= tolerance and abs(self.adapter - of.adapter) <= tolerance

    def __str__(self) -> str:
        return f"{self.base:.4f} without the adapter, {self.adapter:.4f} with it"


def _run(*words: str) -> None:
    """Run a command of `surgery` as a user would type it."""
    typer.echo(f"$ surgery {shlex.join(words)}")
    subprocess.run([sys.executable, "-m", "surgery", *words], env=_environment(processes=1), check=True)


def _command(model: Path, train: Path, held_out: Path, output: Path) -> list[str]:
    """The command that a user would type."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    job = ["-m", "surgery", "finetune", str(model), "--data", str(train), "--eval-data", str(held_out)]
    return [*torchrun, *job, "--output", str(output), *(word for option in TRAINING.items() for word in option)]


def _kill_after_checkpoint(command: list[str]) -> None:
    """Run `command` until its first step after the first checkpoint, then kill all of its processes at once."""
    with subprocess.Popen(command, env=_environment(processes=RANKS), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            typer.echo(line, nl=False)
            if line.startswith(f"step {SAVED + 1}/"):
                ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text(encoding="ascii").split()
                for process in (running.pid, *map(int, ranks)):
                    os.kill(process, signal.SIGKILL)
    if running.returncode != -signal.SIGKILL:
        raise typer.Exit(running.returncode or 1)


def _resume(command: list[str], output: Path) -> dict[str, Any]:
    """Run `command` to its end from its checkpoint; returns its summary."""
    subprocess.run([*command, "--resume-from-checkpoint"], env=_environment(processes=RANKS), check=True)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def _environment(*, processes: int) -> dict[str, str]:
    """The environment of each of several processes: no GPU, a share of the cores, and threads that wait passively.

    On a busy machine a spinning thread takes the core from the very thread that it waits for: several times as slow.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _reload(model: Path, adapter: Path, merged: Path, held_out: Path) -> tuple[Losses, Losses, float]:
    """Evaluate in a fresh process with plain transformers and PEFT; returns losses `(plain, rounded, merged)`.

    Shows what the merged model says to the first held-out question.
    """
    arguments = [str(model), str(adapter), str(merged), str(held_out), "--max-length", str(MAX_LENGTH)]
    command = [sys.executable, str(RELOAD), *arguments]
    environment = _environment(processes=1)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    typer.echo(f"\nQuestion: {found['question']}\nAnswer of the merged model: {found['answer']}")
    return Losses(**found["plain"]), Losses(**found["rounded"]), found["merged"]


def failures(summary: dict[str, Any], trained: Losses, plain: Losses, rounded: Losses) -> Iterator[str]:
    """The expectations that were not met, one sentence each."""
    if not trained.adapter < trained.base:
        yield f"training did not lower the held-out loss: {trained}"
    if summary["resumed_after"] != SAVED or summary["steps"] != STEPS:
        yield f"expected {STEPS} steps, resumed after {SAVED}; found {summary['steps']}, {summary['resumed_after']}"
    if not plain.adapter < plain.base:
        yield f"the reloaded adapter does not lower the held-out loss of the plain model: {plain}"
    if not abs(plain.adapter - trained.adapter) <= TOLERANCE:
        yield f"on the plain model, more than {TOLERANCE} away from {trained.adapter:.4f}: {plain}"
    if not rounded.is_within(ROUNDED_TOLERANCE, of=trained):
        yield f"on rounded weights, more than {ROUNDED_TOLERANCE} away from {trained}: {rounded}"
    if summary["patches_left"]:
        yield f"patches are still active: {', '.join(summary['patches_left'])}"
    if len(summary["memory"]) != RANKS:
        yield f"expected the memory of {RANKS} ranks, found {len(summary['memory'])}"


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint with a chat template.")],
    train: Annotated[Path, typer.Argument(help="JSONL file to train on.")],
    held_out: Annotated[Path, typer.Argument(help="JSONL file to evaluate on.")],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter.")],
) -> None:
    """Quantize, fine-tune on two CPU ranks, killed and resumed, merge, and use what was saved."""
    begin = time.monotonic()
    packed, merged = output.with_name("packed"), output.with_name("merged")
    _run("quantize", str(model), str(packed), "--overwrite")
    command = _command(packed, train, held_out, output)
    shutil.rmtree(output, ignore_errors=True)
    typer.echo(f"$ torchrun {shlex.join(command[3:])}")
    _kill_after_checkpoint(command)
    typer.echo("\nKilled. The same command with --resume-from-checkpoint goes on")
    summary = _resume(command, output)
    trained = Losses.of(summary["evaluations"])
    _run("merge", str(model), str(output), str(merged), "--overwrite")
    typer.echo("\nReloading adapter and merged model with plain transformers and PEFT, in a fresh process")
    plain, rounded, loss = _reload(model, output, merged, held_out)

    typer.echo("\nMean loss on the held-out text")
    typer.echo(f"  in training, 4 bits, {RANKS} ranks           {trained}")
    typer.echo(f"  reloaded, weights rounded to 4 bits   {rounded} (at most {ROUNDED_TOLERANCE} apart)")
    typer.echo(f"  reloaded, weights as they were        {plain} (at most {TOLERANCE} with the adapter)")
    typer.echo(f"  merged, in bfloat16                   {loss:.4f} (at most {MERGED_TOLERANCE} from the line above)")
    typer.echo(f"{time.monotonic() - begin:.0f} seconds in all")
    found = list(failures(summary, trained, plain, rounded))
    if not abs(loss - plain.adapter) <= MERGED_TOLERANCE:
        found.append(f"merged, more than {MERGED_TOLERANCE} away from {plain.adapter:.4f}: {loss:.4f}")
    if found:
        typer.echo("\n".join(f"FAILED: {failure}" for failure in found), err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
