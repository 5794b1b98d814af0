"""Report on how a model was built: seconds, bytes read and memory per phase, notices, a progress bar."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from surgery.telemetry.measurements import (
    SAMPLE_PERIOD,
    History,
    MemorySample,
    Notice,
    Phase,
    Prediction,
    Sampler,
    anonymous_memory,
    group_names,
    say,
)
from surgery.telemetry.numbers import say_size

__all__ = ["Phase", "Report", "anonymous_memory"]

T = TypeVar("T")

#: Seconds between two lines about progress, where there is no terminal.
LINE_PERIOD = 20.0


@dataclass(kw_only=True)
class Report:
    """Measurements of one rank, from when it is made. Any thread may use it.

    show_progress: draw a bar for layer loops, and say on stderr what is ignored or read once per node: for rank 0.
    verbs: what it says of layers in such a loop, and after it.
    phases: in the order in which they ended.
    predictions: what a plan expects, by the group of phases; see `predict`.
    history: memory over time, while `recording`; otherwise empty.
    bytes_read: from checkpoints so far; see `count_bytes`.
    read_once_per_node: checkpoint tensors that one rank of each node reads and converts for the others, because the
        model merges, splits or transposes them. ignored: names of the checkpoint that the model has no use for.
        initialized: buffers that the checkpoint lacks. left_out: weights of experts that stay in 16 bits. misread:
        weights that bitsandbytes dequantizes wrongly on this CPU. Each is names, with `*` for numbers in which they
        differ, and how many there are; see `note`.
    """

    show_progress: bool = False
    verbs: tuple[str, str] = ("Loading", "Loaded")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    phases: list[Phase] = field(default_factory=list)
    predictions: dict[str, Prediction] = field(default_factory=dict)
    history: History = field(default_factory=History)
    bytes_read: int = 0
    read_once_per_node: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    initialized: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    misread: dict[str, int] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter, init=False, repr=False)
    _running: list[Phase] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _sampler: Sampler = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Weights go to a GPU through buffers that stay as they are, and each look takes the interpreter from the
        # threads that load.
        self._sampler = Sampler(SAMPLE_PERIOD if self.device.type == "cpu" else 10 * SAMPLE_PERIOD)

    @property
    def seconds(self) -> float:
        """Seconds since the report was made."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def phase(self, name: str, *, group: str = "load") -> Iterator[Phase]:
        """Measure a block.

        Phases of one thread do not nest. Those of two threads may overlap: memory and bytes read are the process's, so
        that each then has those of both.
        """
        phase = Phase(name=name, group=group, start=self.seconds, host_before=anonymous_memory())

        def look() -> None:
            phase.host_peak = max(phase.host_peak, anonymous_memory())

        self._begin(phase)
        try:
            with self._sampler.calling(look):
                yield phase
        finally:
            self._end(phase)

    def count_bytes(self, count: int) -> None:
        """Say that `count` more bytes have been read from a checkpoint."""
        with self._lock:
            self.bytes_read += count
            for phase in self._running:
                phase.bytes_read += count

    def predict(self, group: str, *, host: int | None = None, device: int | None = None) -> None:
        """Note the peaks that a plan expects of the phases of `group`, in bytes above what is held now."""
        self.predictions[group] = Prediction(
            host=host, device=device, host_before=anonymous_memory(), device_before=self._device_memory()[0]
        )

    def note(self, notice: Notice, names: Iterable[str]) -> None:
        """Keep `names` in the field called `notice`, counted in groups; with `show_progress` say any on stderr."""
        groups = group_names(names)
        setattr(self, notice, groups)
        if groups and self.show_progress:
            from tqdm.auto import tqdm

            # As the bar is, so that whatever is drawn goes on below the line.
            tqdm.write(say(notice, groups), file=sys.stderr)

    @contextlib.contextmanager
    def recording(self) -> Iterator[History]:
        """Fill `history` while the block runs, between phases too."""

        def look() -> None:
            self.history.add(MemorySample(round(self.seconds, 4), anonymous_memory(), *self._device_memory()))

        with self._sampler.calling(look):
            yield self.history

    def track(self, items: Sequence[T], *, names: Callable[[T], Iterable[str]]) -> Iterator[T]:
        """The items, while stderr shows how many layers are complete: those that the FQNs `names` are in."""
        if not self.show_progress:
            yield from items
            return
        complete = _complete_layers([[*names(item)] for item in items])
        total, began = max(complete, default=0), self.seconds
        with self._bar(total) if sys.stderr.isatty() else self._lines(total) as show:
            for item, count in zip(items, complete, strict=True):
                yield item
                show(count)
        read, seconds = say_size(self.bytes_read), self.seconds - began
        sys.stderr.write(f"{self.verbs[1]} {total} layers: {read} read by this rank in {seconds:.1f} s\n")

    @contextlib.contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[int], None]]:
        """Draw a bar in the width of the terminal, which is gone at the end of the block."""
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=self.verbs[0], unit=" layers", leave=False, dynamic_ncols=True) as bar:

            def show(count: int) -> None:
                bar.set_postfix_str(say_size(self.bytes_read), refresh=False)
                bar.update(count - bar.n)

            yield show

    @contextlib.contextmanager
    def _lines(self, total: int) -> Iterator[Callable[[int], None]]:
        """Write a line now and then: a log file has no line to draw over."""
        said = self.seconds

        def show(count: int) -> None:
            nonlocal said
            if self.seconds - said < LINE_PERIOD:
                return
            said = self.seconds
            sys.stderr.write(f"{self.verbs[0]}: {count} of {total} layers, {say_size(self.bytes_read)}\n")

        yield show

    def as_dict(self) -> dict[str, dict[str, float]]:
        """`{phase: {start, seconds, bytes_read, host_before, host_peak, device_peak}}`, seconds and bytes.

        Phases of one name are one: they begin with the first, and have the highest peaks of them.
        """
        found: dict[str, dict[str, float]] = {}
        for phase in self.phases:
            before = {"start": round(phase.start, 3), "host_before": phase.host_before}
            figures = found.setdefault(
                phase.name, {**before, "seconds": 0, "bytes_read": 0, "host_peak": 0, "device_peak": 0}
            )
            figures["seconds"] = round(figures["seconds"] + phase.seconds, 3)
            figures["bytes_read"] += phase.bytes_read
            figures["host_peak"] = max(figures["host_peak"], phase.host_peak)
            figures["device_peak"] = max(figures["device_peak"], phase.device_peak)
        return found

    def _begin(self, phase: Phase) -> None:
        with self._lock:
            self._note_device_peak()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._running.append(phase)

    def _end(self, phase: Phase) -> None:
        try:
            # Not while another phase runs: its thread would go on giving the device work, and this one wait for that.
            if self.device.type == "cuda" and len(self._running) == 1:
                torch.cuda.synchronize(self.device)  # raises what an earlier kernel has failed with
        finally:
            with self._lock:
                self._note_device_peak()
                self._running = [each for each in self._running if each is not phase]
                phase.seconds = self.seconds - phase.start
                self.phases.append(phase)

    def _note_device_peak(self) -> None:
        """Give the peak so far to the phases that run: torch has one for the process, which the next phase resets."""
        if self.device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self.device)
        for phase in self._running:
            phase.device_peak = max(phase.device_peak, peak)

    def _device_memory(self) -> tuple[int, int]:
        """Bytes that torch has allocated on the device now, and that it has reserved; 0 without a GPU."""
        if self.device.type != "cuda":
            return 0, 0
        # One call for both figures; the functions for single ones flatten and sort all that there are.
        statistics = torch.cuda.memory_stats_as_nested_dict(self.device)
        if not statistics:
            return 0, 0  # CUDA has not been used yet
        allocated, reserved = statistics["allocated_bytes"], statistics["reserved_bytes"]
        return int(allocated["all"]["current"]), int(reserved["all"]["current"])


def _complete_layers(items: Sequence[Sequence[str]]) -> list[int]:
    """Count the layers that are complete after each of `items`, which are FQNs of modules.

    A layer is what has a number, `model.layers.3`; or, in a model that numbers none, a module.
    """
    numbered = [[layer for name in names if (layer := _numbered(name))] for names in items]
    layers = numbered if any(numbered) else items
    last = {layer: place for place, found in enumerate(layers) for layer in found}
    return [sum(place <= number for place in last.values()) for number in range(len(items))]


def _numbered(name: str) -> str:
    """The part of an FQN that ends with its first number; empty if it has none."""
    parts = name.split(".")
    return next((".".join(parts[: place + 1]) for place, part in enumerate(parts) if part.isdigit()), "")
