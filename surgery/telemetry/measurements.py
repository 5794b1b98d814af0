"""Measurements of a run: phases, memory over time, predictions of both, and notices; free of torch."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = [
    "SAMPLE_PERIOD",
    "History",
    "MemorySample",
    "Notice",
    "Phase",
    "Prediction",
    "Sampler",
    "anonymous_memory",
    "group_names",
    "say",
]

#: Samples that a history keeps at most: a picture has about a thousand columns.
SAMPLES = 4096


@dataclass(kw_only=True)
class Phase:
    """One phase, in bytes and seconds. Host memory is anonymous memory, device memory what torch has allocated.

    group: what a prediction is made for: `load`, `train`.
    start: seconds after the report began.
    bytes_read: from checkpoints, by every thread, while the phase ran.
    """

    name: str
    group: str = "load"
    start: float = 0.0
    seconds: float = 0.0
    bytes_read: int = 0
    host_before: int = 0
    host_peak: int = 0
    device_peak: int = 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Peaks, in bytes, that a plan expects of a group of phases, above what was held when it was made.

    None where the plan says nothing. `host_before` and `device_before` are what was held.
    """

    host: int | None = None
    device: int | None = None
    host_before: int = 0
    device_before: int = 0


class MemorySample(NamedTuple):
    """The most memory seen from `seconds` on until the next sample, in bytes; on the device 0 without one."""

    seconds: float
    host: int
    device_allocated: int = 0
    device_reserved: int = 0


@dataclass(kw_only=True)
class History:
    """Samples of memory in order of time, never more than `limit` (2 or more).

    When it is full, neighbours are joined in pairs, and from then on twice as many samples make one. Each keeps the
    maxima of those that it stands for, so that no peak is lost, however long a run is.
    """

    limit: int = SAMPLES
    samples: list[MemorySample] = field(default_factory=list)
    _width: int = field(default=1, init=False, repr=False)
    _joined: int = field(default=0, init=False, repr=False)

    def add(self, sample: MemorySample) -> None:
        """Append `sample`, or join it to the last one."""
        if self._joined:
            self.samples[-1] = _join(self.samples[-1], sample)
        else:
            self._make_room()
            self.samples.append(sample)
        self._joined = (self._joined + 1) % self._width

    def _make_room(self) -> None:
        if len(self.samples) < self.limit:
            return
        kept = self.samples
        self.samples = [_join(first, second) for first, second in zip(kept[::2], kept[1::2], strict=False)]
        self.samples += kept[len(kept) & ~1 :]  # of an odd number, one is left over
        self._width *= 2


def _join(first: MemorySample, second: MemorySample) -> MemorySample:
    return MemorySample(first.seconds, *map(max, first[1:], second[1:]))


#: Seconds between two looks at the process's memory, at first. A layer takes milliseconds to seconds.
SAMPLE_PERIOD = 0.005

#: What lasts is looked at less often: the time since it began, divided by this, is between two looks, up to so many
#: seconds. Each wakes a thread, which takes a core 100 microseconds: every 5 ms that would be 2 % of it.
LOOKS = 200
LONGEST_PERIOD = 0.05


def anonymous_memory() -> int:
    """Bytes of resident memory of this process that no file backs (`RssAnon`); 0 where the kernel does not say.

    From `statm`, which costs a fifth of `status`: pages that are resident, less those that files or shared memory back.
    """
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        _, resident, shared, *_ = os.read(statm, 256).split()
    finally:
        os.close(statm)
    return (int(resident) - int(shared)) * mmap.PAGESIZE


class Sampler:
    """Calls functions again and again from one thread, however many they are: a wake-up costs more than a look."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._looks: list[Callable[[], None]] = []
        self._lock = threading.Lock()  # held while functions are called
        self._began = 0.0  # the last of them
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def calling(self, look: Callable[[], None]) -> Iterator[None]:
        """Call `look` when the block begins, again and again from a thread while it runs, and when it ends.

        Calls never overlap. What lasts for less than the time between two of them may go unseen: that is `period`
        seconds, and after a while more.
        """
        look()
        self._add(look)
        try:
            yield
        finally:
            self._remove(look)
            look()

    def _add(self, look: Callable[[], None]) -> None:
        with self._lock:
            self._looks.append(look)
            self._began = time.monotonic()
            if len(self._looks) > 1:
                return
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._repeat, args=(self._done,), name="surgery-memory", daemon=True)
            self._thread.start()

    def _remove(self, look: Callable[[], None]) -> None:
        with self._lock:
            self._looks.remove(look)
            if self._looks:
                return
            self._done.set()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _repeat(self, done: threading.Event) -> None:
        while not done.wait(max(self._period, min((time.monotonic() - self._began) / LOOKS, LONGEST_PERIOD))):
            with self._lock:
                for look in self._looks if not done.is_set() else ():
                    look()


#: Kinds of notices, by the field of `Report` that keeps their names.
Notice = Literal["read_once_per_node", "ignored", "initialized", "left_out", "misread"]

#: What a line says of one name, of several, and of either.
_TEXTS: Mapping[Notice, tuple[str, str, str]] = {
    "read_once_per_node": (
        "tensor is",
        "tensors are",
        "merged, split, transposed or unpacked for the model, so read once per node, by one rank for the others",
    ),
    "ignored": ("name", "names", "in the checkpoint with no place in this model, ignored as transformers does"),
    "initialized": ("buffer is", "buffers are", "not in the checkpoint; what transformers initializes is used"),
    "left_out": (
        "fused weight of experts stays",
        "fused weights of experts stay",
        (
            "in 16 bits: blocks of 4 bits would straddle experts (choose a smaller blocksize), or the checkpoint or "
            "the class of the model keeps them so; say Quant(experts=False) (--experts 16bit) if that is what you want"
        ),
    ),
    "misread": (
        "4-bit weight is",
        "4-bit weights are",
        (
            "dequantized wrongly by bitsandbytes on this CPU, where rows are not whole blocks. The result equals "
            'stock\'s; for the right one, run inside of patches.transaction("bitsandbytes.cpu-dequantize-flat", '
            'reason="...")'
        ),
    ),
}

#: Most groups that a line names; a model has few, however many layers and experts it has.
SHOWN = 8


def group_names(keys: Iterable[str]) -> dict[str, int]:
    """Count `keys`, which are unique, in groups that differ in numbers alone, with `*` where they do.

    In order of first appearance: `{"model.layers.*.mlp.experts.*.w1.weight": 256}`. A key alone is its own name.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for key in keys:
        parts = key.split(".")
        groups.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    return {_common_name(members): len(members) for members in groups.values()}


def say(notice: Notice, groups: Mapping[str, int]) -> str:
    """The line about `groups`, at least one: how many names there are, what happens to them, and which they are."""
    one, several, what = _TEXTS[notice]
    total = sum(groups.values())
    return f"{total:,} {one if total == 1 else several} {what}: {', '.join(_names(groups))}."


def _names(groups: Mapping[str, int]) -> list[str]:
    names = [name if count == 1 else f"{name} ({count:,})" for name, count in groups.items()]
    rest = sum(list(groups.values())[SHOWN:])
    return [*names[:SHOWN], *([f"{rest:,} more"] if rest else [])]


def _common_name(members: list[list[str]]) -> str:
    """The name that all have, with `*` for numbers that are not the same in all."""
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*members, strict=True))
