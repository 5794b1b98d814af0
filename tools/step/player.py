"""Play one way on one rank: load, then train when told to. It is told, and answers, through a connection."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from loading.batches import Batch
from loading.outcome import describe
from loading.profiling import kernels
from loading.world import World, alone, joined
from step.options import Options, Way
from step.ways import LOADERS, Case, Trained, import_first

__all__ = ["longest_of", "play"]

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "liger-kernel", "unsloth", "axolotl")

#: Tokens of the first length that is tried for the longest sequence, and of what all are multiples of.
FIRST, GRAIN = 16384, 4096


def play(connection: Connection, options: Options) -> None:
    """Follow commands until there are no more: each a mapping with `do`, each answered by a mapping.

    An error is an answer, `{"error": ...}`, and the next command is followed all the same.
    """
    way = Way.of(options.way)
    with tempfile.TemporaryDirectory() as folder:
        import_first(way, folder)
        seat = alone if int(os.environ.get("WORLD_SIZE", "1")) == 1 else joined
        with seat(options.device, memory_cap=options.memory_cap) as world:
            player = _Player(options=options, way=way, world=world)
            answer: dict[str, Any] = {"environment": _environment(world)}
            while True:
                connection.send(answer)
                command = connection.recv()
                if command["do"] == "end":
                    break
                answer = _answered(player, command)
    # Groups, graphs and others' threads need not be wound up in order.
    sys.stdout.flush()
    os._exit(0)


def _answered(player: _Player, command: dict[str, Any]) -> dict[str, Any]:
    follow: Callable[..., dict[str, Any]] = getattr(player, command.pop("do"))
    try:
        return follow(**command)
    except Exception as error:  # noqa: BLE001  # any error is a result
        traceback.print_exc()
        return {"error": describe(error)}
    finally:
        player.tidy()


def _environment(world: World) -> dict[str, str]:
    """The class of GPU, and the versions of what is installed."""
    found = {"device": "CPU"}
    if world.on_cuda:
        name = torch.cuda.get_device_name(world.device)
        found["device"] = next(iter(re.findall(r"[A-Z]+\d+\w*", name)), name)
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@dataclass(kw_only=True)
class _Player:
    """One rank of one way."""

    options: Options
    way: Way
    world: World
    trained: Trained | None = None
    checkpoints: bool = False

    @property
    def devices(self) -> list[torch.device]:
        """GPUs that the model is on."""
        if not self.world.on_cuda:
            return []
        if "balanced" in self.way.options:
            return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        return [self.world.device]

    def synchronize(self) -> None:
        """Wait for the devices."""
        for device in self.devices:
            torch.cuda.synchronize(device)

    def tidy(self) -> None:
        """Leave the devices' memory to others between commands."""
        if self.trained is not None:
            self.trained.optimizer.zero_grad(set_to_none=True)
        self.world.clear()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)

    def load(self) -> dict[str, Any]:
        """Load the model; answers when this rank was ready, and what it keeps."""
        torch.manual_seed(self.options.seed)
        world = self.world
        world.meet()
        start = time.perf_counter()
        self.trained = LOADERS[self.way.base](Case(options=self.options, way=self.way, world=world))
        world.meet()
        ready = time.perf_counter() - start
        self.trained.model.train()
        adapters = {parameter.dtype for parameter in self.trained.model.parameters() if parameter.requires_grad}
        held = [torch.cuda.memory_allocated(device) for device in self.devices]
        return {
            "ready": round(ready, 3),
            "held": max(held, default=0),
            "adapters": ", ".join(sorted(map(str, adapters))),
        }

    def train(self, *, batch: str, steps: int, profile: bool) -> dict[str, Any]:
        """Take steps on one batch, and one more under the profiler; answers losses, seconds, peaks, and kernels."""
        step = self._stepping(Batch.of(batch))
        losses, seconds = [], []
        for _ in range(steps):
            self.world.meet()
            start = time.perf_counter()
            loss = step()
            self.synchronize()
            seconds.append(round(time.perf_counter() - start, 5))
            losses.append(loss.item())
        answer: dict[str, Any] = {"losses": losses, "seconds": seconds, **self._peaks()}
        if profile and self.world.on_cuda:
            self.world.meet()
            found = kernels(step, synchronize=self.synchronize)
            answer |= {"busy": found.busy, "useful": found.useful, "launches": found.launches}
        return answer

    def longest(self, *, most: int) -> dict[str, Any]:
        """Find the longest sequence that trains, with checkpointing: double until memory does not suffice, bisect."""
        return {"longest": longest_of(self._fits, start=FIRST, grain=GRAIN, most=most)}

    def _fits(self, tokens: int) -> bool:
        try:
            self._stepping(Batch(sequences=1, tokens=tokens, checkpointing=True))()
            self.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            self.tidy()
        print(f"{tokens} tokens fit", flush=True)
        return True

    def _stepping(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """Make ready for a batch; checkpointing stays once it is on."""
        assert self.trained is not None
        if batch.checkpointing and not self.checkpoints:
            self.trained.checkpoint()
            self.checkpoints = True
        config = json.loads(Path(self.options.checkpoint, "config.json").read_text(encoding="utf-8"))
        ids = batch.draw(config["vocab_size"], seed=self.options.seed + self.world.rank).to(self.world.device)
        trained = self.trained
        return lambda: trained.step(ids)

    def _peaks(self) -> dict[str, int]:
        peaks = [torch.cuda.max_memory_allocated(device) for device in self.devices]
        reserved = [torch.cuda.max_memory_reserved(device) for device in self.devices]
        return {"peak": max(peaks, default=0), "reserved": max(reserved, default=0)}


def longest_of(fits: Callable[[int], bool], *, start: int, grain: int, most: int) -> int:
    """Largest multiple of `grain` up to `most` that fits, or 0: `start` is doubled, then the last interval bisected."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most // grain * grain + grain)
    while high - low > grain:
        middle = (low + high) // 2 // grain * grain
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
