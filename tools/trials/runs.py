"""Runs of a script by torchrun, stock and under `surgery run`, and what each of them did."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["Trial", "TrialFailedError", "largest_difference", "run", "unequal_tensors"]

_ROOT: Final = Path(__file__).resolve().parents[2]
_OBSERVED: Final = Path(__file__).with_name("observed.py")


class TrialFailedError(Exception):
    """A script did not end with 0, or not in time."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Report of one run: `events` by rank, in order; `folder` has its output, and what it printed."""

    folder: Path
    events: tuple[tuple[dict[str, Any], ...], ...]

    @property
    def out(self) -> Path:
        """The folder that the script was given to write into."""
        return self.folder / "out"

    @property
    def losses(self) -> list[list[float]]:
        """Each loss that went backward, by rank."""
        return [[event["value"] for event in self._all("loss", rank)] for rank in range(len(self.events))]

    @property
    def evaluations(self) -> list[float]:
        """Losses of evaluations that Trainer logged."""
        return [event["logs"]["eval_loss"] for event in self._all("log", 0) if "eval_loss" in event["logs"]]

    @property
    def parameter_bytes(self) -> list[int]:
        """Bytes of parameters in memory after `from_pretrained`, by rank."""
        return [self._all("from_pretrained", rank)[0]["parameter_bytes"] for rank in range(len(self.events))]

    @property
    def peaks(self) -> list[int]:
        """Most bytes resident until training began (for a loop: until all was prepared), by rank."""
        found = []
        for rank in range(len(self.events)):
            began = self._all("train_begin", rank) or self._all("prepare", rank)
            found.append(began[-1]["peak"])
        return found

    @property
    def kinds(self) -> list[list[dict[str, int]]]:
        """Number of parameters by dtype and by whether they are trained, at each `prepare`, by rank."""
        return [[one["parameters"] for one in self._all("prepare", rank)] for rank in range(len(self.events))]

    @property
    def resident(self) -> list[int]:
        """Bytes resident when the first model was about to be loaded, by rank: Python, libraries, data."""
        return [self._all("load", rank)[0]["resident"] for rank in range(len(self.events))]

    @property
    def files(self) -> dict[str, int]:
        """Files that the script wrote, and their bytes."""
        found = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {str(path.relative_to(self.out)): path.stat().st_size for path in found}

    @property
    def left(self) -> list[str]:
        """Targets of patches that are other objects after the run than before, on any rank."""
        return sorted({name for rank in range(len(self.events)) for name in self._all("done", rank)[0]["left"]})

    @property
    def printed(self) -> str:
        """All that the ranks printed, on stdout and stderr."""
        return (self.folder / "printed").read_text(errors="replace")

    def _all(self, event: str, rank: int) -> list[dict[str, Any]]:
        return [one for one in self.events[rank] if one["event"] == event]


def run(
    script: Path, arguments: Sequence[str], folder: Path, *, low_memory: bool, ranks: int = 2, timeout: float = 300
) -> Trial:
    """Run `script` on CPU ranks; `{out}` in an argument stands for the folder to write into.

    Raises TrialFailedError with the last lines it printed.
    """
    folder.mkdir(parents=True)
    given = [argument.replace("{out}", str(folder / "out")) for argument in arguments]
    flags = ["--low-memory"] if low_memory else []
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(_free_port())]
    launched = [str(_OBSERVED), *flags, str(folder), str(script), *given]
    command = [sys.executable, *(launch if ranks > 1 else ()), *launched]
    with (folder / "printed").open("w") as printed:
        try:
            ran = subprocess.run(
                command, env=_environment(), stdout=printed, stderr=subprocess.STDOUT, timeout=timeout, check=False
            )
            code = str(ran.returncode)
        except subprocess.TimeoutExpired:
            code = f"a timeout of {timeout} s"
    if code != "0":
        tail = (folder / "printed").read_text(errors="replace")[-6000:]
        raise TrialFailedError(f"{script.name} {'under surgery run' if low_memory else 'alone'}: {code}\n{tail}")
    files = [folder / f"rank{rank}.jsonl" for rank in range(ranks)]
    events = tuple(tuple(json.loads(line) for line in file.read_text().splitlines()) for file in files)
    return Trial(folder=folder, events=events)


def largest_difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Largest absolute difference of losses by rank; infinite if they are not as many."""
    if [len(losses) for losses in one] != [len(losses) for losses in other] or not any(one):
        return float("inf")
    return max(abs(a - b) for row, against in zip(one, other, strict=True) for a, b in zip(row, against, strict=True))


def unequal_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors of two safetensors files that differ, or that only one of them has."""
    import torch
    from safetensors.torch import load_file

    left, right = load_file(one), load_file(other)
    alone = left.keys() ^ right.keys()
    return sorted(alone | {name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])})


def _environment() -> dict[str, str]:
    # Nothing of the environment of this process that says something about ranks or FSDP.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "PATCHES_APPLY": "accelerate.fsdp-on-cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
