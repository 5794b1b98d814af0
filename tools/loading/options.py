"""Options of a benchmark, on the command line and between processes."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Options", "add_arguments"]

#: Each is described in `loading.ways`.
WAYS = (
    "read",
    "sharded",
    "packed",
    "unsharded",
    "rank0-cpu",
    "replicated",
    "replicated-fsdp2",
    "seed",
    "accelerate-fsdp1",
    "accelerate-fsdp2",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a benchmark, equal on all ranks.

    ways: in the order of their turns. repeats: turns of each way. steps: training steps after the last turn of each,
    with one sequence of `length` tokens per rank; 0 measures loading alone. memory_cap: GiB that torch may use of a
    GPU, or None. packed: folder of the same model, packed already, for the way `packed`. seed_threads: threads that
    load and quantize in the way `seed`; None uses its authors' number.
    """

    checkpoint: Path
    packed: Path | None = None
    ways: tuple[str, ...]
    repeats: int = 1
    steps: int = 8
    length: int = 1024
    activation_checkpointing: bool = False
    memory_cap: float | None = None
    device: str = "cpu"
    seed_threads: int | None = None
    profile: Path | None = None

    def __post_init__(self) -> None:
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown or not self.ways:
            raise ValueError(f"expected some of {', '.join(WAYS)} as ways; found {', '.join(unknown) or 'none'}")
        if "packed" in self.ways and self.packed is None:
            raise ValueError("expected the folder of a packed checkpoint for the way packed: give --packed")

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Options:
        """Make options from the arguments of `add_arguments`."""
        values = {name: getattr(parsed, name) for name in cls.__dataclass_fields__}
        values["device"] = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(**values)

    def arguments(self) -> list[str]:
        """The command line from which `of` makes equal options."""
        words = ["--checkpoint", str(self.checkpoint), "--ways", ",".join(self.ways), "--device", self.device]
        words += ["--repeats", str(self.repeats), "--steps", str(self.steps), "--length", str(self.length)]
        words += ["--activation-checkpointing"] if self.activation_checkpointing else []
        for name in ("packed", "memory_cap", "seed_threads", "profile"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        return words

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON values, with only the last component of paths."""
        values = asdict(self)
        names = {name: path.name for name, path in values.items() if isinstance(path, Path)}
        return {**values, **names}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark."""
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder of a Llama in 16 bits (see make_checkpoint.py)")
    add("--packed", type=Path, help="the same, packed by `surgery quantize`, for the way `packed`")
    add(
        "--ways",
        type=_names,
        default=tuple(w for w in WAYS if w != "packed"),
        metavar="A,B,...",
        help=f"some of {','.join(WAYS)}; default: all that can run",
    )
    add("--repeats", type=_at_least(1), default=1, help="turns of each way; medians are of these")
    add("--steps", type=_at_least(0), default=8, help="training steps after the last turn; 0: load only")
    add("--length", type=_at_least(2), default=1024, help="tokens of a sequence; a batch is one sequence a rank")
    add("--activation-checkpointing", action="store_true", help="recompute decoder blocks in backward, in every way")
    add("--memory-cap", type=float, metavar="GIB", help="what torch may take of each GPU")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--seed-threads", type=_at_least(1), help="that quantize in the way `seed`; default: cores a rank")
    add("--profile", type=Path, metavar="DIR", help="write a profile of a few more steps of each way there")


def _names(value: str) -> tuple[str, ...]:
    return tuple(name for name in value.split(",") if name)


def _at_least(least: int) -> Any:
    def number(value: str) -> int:
        if (found := int(value)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, found {value}")
        return found

    return number


def cores_per_rank(ranks: int) -> int:
    """Number of cores of this machine for each rank."""
    return max(1, (os.cpu_count() or 1) // ranks)
