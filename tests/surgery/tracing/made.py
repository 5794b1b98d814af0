"""Traces made by hand, and pages read back as a browser's parser would read them."""

from __future__ import annotations

import mmap
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from surgery.telemetry.measurements import History, MemorySample, Phase, Prediction
from surgery.tracing.record import RankTrace

MIB = 2**20

#: Elements that have no end tag in HTML.
VOID = {"meta"}


def pages(size: int) -> torch.Tensor:
    """Tensor of `size` bytes, all in use, that go back to the system with it; malloc might keep them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def look(history: History, count: int = 3) -> None:
    """Wait until memory has been sampled `count` times more."""
    enough = len(history.samples) + count
    while len(history.samples) < enough:
        time.sleep(0.001)


def trace_of(rank: int = 0, world_size: int = 1, **changes: Any) -> RankTrace:
    """A rank that loads for two seconds, adapts meanwhile in another thread, and trains until the third."""
    trace = RankTrace(
        rank=rank,
        world_size=world_size,
        device="cpu",
        started=1_700_000_000.0 + rank,
        seconds=3.0,
        bytes_read=4_000_000,
        phases=(
            Phase(name="load", start=0.0, seconds=2.0, bytes_read=4_000_000, host_before=80 * MIB, host_peak=150 * MIB),
            Phase(name="adapt", start=1.0, seconds=0.5, host_before=90 * MIB, host_peak=150 * MIB),
            Phase(name="train", group="train", start=2.0, seconds=1.0, host_before=100 * MIB, host_peak=200 * MIB),
        ),
        predictions={"load": Prediction(host=50 * MIB, host_before=80 * MIB)},
        samples=(
            MemorySample(0.0, 80 * MIB),
            MemorySample(1.0, 150 * MIB),
            MemorySample(2.0, 120 * MIB),
            MemorySample(2.5, 200 * MIB),
        ),
    )
    return replace(trace, **changes)


class Page(HTMLParser):
    """A page: its elements in order, the text of each kind, and its tables as rows of cells.

    A cell is the exact value of the figure in it, or the text where there is none. Raises if tags are not balanced.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[tuple[str, list[list[str]]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "an element that is never closed"

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def rows(self, kind: str) -> list[list[list[str]]]:
        """The tables of a class, without their heads."""
        return [[row for row in rows if row] for name, rows in self.tables if name == kind]

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append((attributes["class"], []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag == "td":
            self.tables[-1][1][-1].append("")
        if tag == "data":
            self.tables[-1][1][-1][-1] = attributes["value"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.texts.setdefault(self._open[-1], []).append(data)
        if self._open[-1] in {"td", "a"} and "td" in self._open:
            self.tables[-1][1][-1][-1] += data
