"""Try a command of surgery that writes a checkpoint: its memory and bytes, kills at random moments, disks that refuse.

    python tools/make_checkpoint.py synthetic build/model --shape llama-1gb
    python tools/export_trials.py memory "quantize build/model" build/packed --ranks 2
    python tools/export_trials.py kills "quantize build/model" build/packed
    python tools/export_trials.py refusals "quantize build/model" build/packed

The command is given without its last argument, the output, which is removed before and after.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

#: Seconds between two looks at a process.
PERIOD = 0.002

#: Imported once, so that a process starts in milliseconds.
PRELOAD = ["surgery.cli", "surgery.writing.quantize", "surgery.writing.merge", "bitsandbytes", "peft", "transformers"]

#: Bytes that a rank may hold beside two of the largest tensors.
ALLOWANCE = 128 << 20

Command = Annotated[
    str, typer.Argument(metavar='"COMMAND MODEL ..."', help="Words of the command, without the output.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The output; removed before and after.")]
NumRanks = Annotated[int, typer.Option(min=1, help="Number of processes.")]


@app.command()
def memory(command: Command, out: Out, *, ranks: NumRanks = 1) -> None:
    """Measure peaks of anonymous memory, and bytes read and written, against what is planned; exit with 1 if above."""
    remove(out)
    started = time.monotonic()
    job = Job.start(command, out, ranks)
    code = job.wait()
    seconds = time.monotonic() - started
    require(code == 0, f"the command has failed ({code}): {job.said()}")
    sources = [*weights_of(command)]
    largest = max(size for file in sources for size in tensor_sizes(file))
    bytes_of = {
        "read": (sum(each.read for each in job.ranks), sum(file.stat().st_size for file in sources)),
        "written": (sum(each.written for each in job.ranks), sum(map(len, contents(out).values()))),
    }
    found = {
        "seconds": round(seconds, 1),
        "seconds of work": round(job.seconds, 1),
        "peak MiB above the start of work, by rank": [round(each.peak / 2**20, 1) for each in job.ranks],
        "allowed MiB": round((2 * largest + ALLOWANCE) / 2**20, 1),
        "largest tensor MiB": round(largest / 2**20, 1),
        **{f"MB {name}, and planned": [round(each / 1e6, 2) for each in both] for name, both in bytes_of.items()},
    }
    typer.echo(json.dumps(found, indent=2))
    remove(out)
    require(max(each.peak for each in job.ranks) <= 2 * largest + ALLOWANCE, "a rank has held more than is allowed")
    for name, (done, planned) in bytes_of.items():
        require(abs(done - planned) <= 0.01 * planned, f"bytes {name}: more than 1 % apart")


@app.command()
def kills(
    command: Command,
    out: Out,
    *,
    ranks: NumRanks = 1,
    times: Annotated[int, typer.Option(help="Number of kills.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill the command again and again; what is there is always complete or absent, and resumed to the same bytes."""
    remove(out)
    job = Job.start(command, out, ranks)
    require(job.wait() == 0, f"the command has failed: {job.said()}")
    expected, seconds = contents(out), job.seconds
    remove(out)
    draw = random.Random(seed)  # noqa: S311  # of moments
    killed, finished, resumed = 0, 0, 0
    while killed < times:
        job = Job.start(command, out, ranks)
        moment = draw.uniform(0, 1.1 * seconds)
        if job.wait(until=moment) is None:
            # One rank, or all at once.
            job.kill(draw.choice([None, *range(ranks)]))
            killed += 1
        found = contents(out)
        require(not found or found == expected, f"after {killed} kills, the output is neither complete nor absent")
        typer.echo(
            f"kill {killed} of {times}, {moment:.2f} s after the work began: {'complete' if found else 'absent'}"
        )
        resumed += (hidden(out) / "new").exists()
        if found:
            finished += 1
            remove(out)
    job = Job.start(command, out, ranks)
    require(job.wait() == 0, f"the command could not go on: {job.said()}")
    require(contents(out) == expected, "what was resumed is not what is written in one run")
    left = hidden(out).exists()
    remove(out)
    require(not left, f"{hidden(out)} is left")
    typer.echo(
        f"{killed} kills of {ranks} ranks in work of {seconds:.1f} s: {finished} outputs were complete all the same, "
        f"{resumed} left to be resumed; the last has identical bytes"
    )


@app.command()
def refusals(command: Command, out: Out) -> None:
    """Try a full disk, one that is full at the end, one that is read-only, and two jobs with one output.

    Disks are made by `unshare`, which needs no root where users may have namespaces of their own.
    """
    remove(out)
    job = Job.start(command, out, 1)
    require(job.wait() == 0, f"the command has failed: {job.said()}")
    expected = contents(out)
    size = sum(map(len, expected.values()))
    previous = out.with_name(f"{out.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for name in ("config.json", "model.safetensors"):
        (previous / name).write_bytes(expected.get("config.json", b"{}"))
    room = pages(contents(previous)) + (64 << 10)
    weights = pages({name: data for name, data in expected.items() if name.endswith(".safetensors")})
    on_disk(command, out, previous, "a disk of half the size", size=room + size // 2)
    on_disk(command, out, previous, "a disk that is full at the end", size=room + weights - (32 << 10))
    on_disk(command, out, previous, "a read-only disk", size=room + 2 * size, mode="ro")
    shutil.rmtree(previous)
    remove(out)

    first = Job.start(command, out, 1)
    first.wait(until=0)
    os.kill(first.ranks[0].process.pid or 0, signal.SIGSTOP)  # so that it is not done before the second begins
    second = Job.start(command, out, 1)
    code = second.wait()
    if code != 2:
        first.kill(None)
    require(code == 2 and "in use by" in second.said(), f"a second job was not refused ({code}): {second.said()}")
    typer.echo(f"two jobs: {second.said()}")
    os.kill(first.ranks[0].process.pid or 0, signal.SIGCONT)
    require(first.wait() == 0 and contents(out) == expected, f"the first job was disturbed: {first.said()}")
    remove(out)


def on_disk(command: str, out: Path, previous: Path, what: str, *, size: int, mode: str = "rw") -> None:
    """Run the command with an output on a disk of so many bytes, where `previous` is to be replaced, and is kept."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / "out"
    words = shlex.join([*argv(command, target), "--overwrite"])
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(out))} && cp -r {shlex.quote(str(previous))} "
        f"{shlex.quote(str(target))} && mount -o remount,bind,{mode} {shlex.quote(str(out))} && {{ {words}; code=$?; "
        f"diff -r {shlex.quote(str(previous))} {shlex.quote(str(target))} || exit 99; exit $code; }}"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-2000:])
    require(
        done.returncode == 2, f"{what}: expected exit code 2 and the previous output, found {done.returncode}: {said}"
    )
    typer.echo(f"{what}: {said}")
    shutil.rmtree(out, ignore_errors=True)


@dataclass(kw_only=True)
class Rank:
    """One process, and what is known of it: bytes of memory at its peak, read and written, since the work began."""

    process: BaseProcess
    log: Path
    before: tuple[int, int, int] | None = None
    now: tuple[int, int, int] = (0, 0, 0)
    peak: int = 0

    @property
    def read(self) -> int:
        """Bytes that it has read since the work began."""
        return self.now[1] - (self.before or self.now)[1]

    @property
    def written(self) -> int:
        """Bytes that it has written since then."""
        return self.now[2] - (self.before or self.now)[2]

    def look(self, *, works: bool) -> None:
        """Note what the kernel knows of it."""
        with suppress(OSError, StopIteration, ValueError):
            proc = Path(f"/proc/{self.process.pid}")
            anonymous = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("RssAnon"))
            io = dict(line.split(": ") for line in (proc / "io").read_text().splitlines())
            # Written to files alone: `wchar` counts what ranks send each other, too.
            self.now = (int(anonymous.split()[1]) << 10, int(io["rchar"]), int(io["write_bytes"]))
        if not works:
            self.before = self.now
        elif self.before is not None:
            self.peak = max(self.peak, self.now[0] - self.before[0])


@dataclass(kw_only=True)
class Job:
    """A command that runs on some ranks. The work has begun when the hidden folder of its output says what it is."""

    ranks: list[Rank]
    out: Path
    began: float | None = None
    earlier: int = field(default=0)
    seconds: float = 0.0

    @classmethod
    def start(cls, command: str, out: Path, ranks: int) -> Job:
        """Start the command."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        started = []
        out.parent.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            log = out.with_name(f"{out.name}.rank{rank}.log")
            process = context.Process(target=run, args=(argv(command, out)[3:], log, rank, (ranks, port)))
            process.start()
            started.append(Rank(process=process, log=log))
        return cls(ranks=started, out=out, earlier=_written(out))

    def wait(self, *, until: float | None = None) -> int | None:
        """The highest exit code once all have ended; None if they still run `until` seconds after the work began."""
        while any(rank.process.is_alive() for rank in self.ranks):
            if self.began is None and _written(self.out) != self.earlier:
                self.began = time.monotonic()
            for rank in self.ranks:
                rank.look(works=self.began is not None)
            if self.began is not None and until is not None and time.monotonic() - self.began >= until:
                return None
            time.sleep(PERIOD)
        self.seconds = time.monotonic() - (self.began or time.monotonic())
        return max(abs(rank.process.exitcode or 0) for rank in self.ranks)

    def kill(self, number: int | None) -> None:
        """Kill one rank, and the others once they have noticed, or all."""
        for rank in self.ranks if number is None else [self.ranks[number]]:
            rank.process.kill()
        for rank in self.ranks:
            rank.process.join(60)
            rank.process.kill()
            rank.process.join()

    def said(self) -> str:
        """The error that the ranks have printed, or the end of what they have."""
        texts = [rank.log.read_text(errors="replace") for rank in self.ranks]
        errors = [line for text in texts for line in text.splitlines() if "error" in line.lower()]
        return errors[0] if errors else texts[0][-2000:]


def run(words: list[str], log: Path, rank: int, world: tuple[int, int]) -> None:
    """Run the command as one rank of `world`: how many there are, and the port where they meet."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    size, port = world
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["surgery", *words]
    from surgery.cli import main

    main()


def argv(command: str, out: Path) -> list[str]:
    """The words of a process that runs the command."""
    return [sys.executable, "-m", "surgery", *shlex.split(command), str(out)]


def pages(files: dict[str, bytes]) -> int:
    """Bytes that files take on a disk of pages of 4 KiB."""
    return sum(-(-len(data) // 4096) * 4096 for data in files.values())


def hidden(out: Path) -> Path:
    """The folder that the command writes to."""
    return out.with_name(f".{out.name}.surgery")


def _written(out: Path) -> int:
    """A number that changes when the work begins."""
    try:
        return (hidden(out) / "job").stat().st_mtime_ns
    except OSError:
        return 0


def remove(out: Path) -> None:
    """Remove the output, and what was left of one that was not completed."""
    for path in (out, hidden(out)):
        shutil.rmtree(path, ignore_errors=True)
    for log in out.parent.glob(f"{out.name}.rank*.log"):
        log.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of `folder`; none if it is not there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(command: str) -> Sequence[Path]:
    """The files of weights in the folders that the command names."""
    folders = [Path(word) for word in shlex.split(command) if Path(word).is_dir()]
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def tensor_sizes(file: Path) -> list[int]:
    """Bytes of every tensor of a file, a packed weight in 16 bits."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = {
        name: spec["data_offsets"][1] - spec["data_offsets"][0] for name, spec in header.items() if "dtype" in spec
    }
    return [4 * size if f"{name}.absmax" in sizes else size for name, size in sizes.items()]


def require(holds: object, otherwise: str) -> None:
    """Print `otherwise`, and end with 1, unless it `holds`."""
    if not holds:
        typer.echo(otherwise, err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
