"""Results of a benchmark, as JSON, tables and a plot."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from loading.chart import chart
from loading.options import Options
from loading.outcome import Outcome
from loading.summary import Summary, summarize
from loading.tables import tables

__all__ = ["Results", "environment"]

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")


def environment(options: Options, *, ranks: int) -> dict[str, Any]:
    """Hardware and versions of the run."""
    on_cuda = options.device == "cuda"
    return {
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if on_cuda else "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


@dataclass(frozen=True, kw_only=True)
class Results:
    """Outcomes of all ranks, turns and ways."""

    options: Options
    environment: dict[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every way has figures, or ran out of memory, which is a result too."""
        return all(each.error in (None, "out of memory") for each in self.summaries())

    def summaries(self) -> list[Summary]:
        """One summary for each way that has run, in their order."""
        had_turn = {outcome.way for outcome in self.outcomes}
        return [summarize(way, self.outcomes) for way in dict.fromkeys(self.options.ways) if way in had_turn]

    def markdown(self) -> str:
        """The environment and the tables, in Markdown."""
        ran_on = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        return "\n\n".join([ran_on, *tables(self.summaries())])

    def write(self, *, json_file: Path | None = None, markdown: Path | None = None, svg: Path | None = None) -> None:
        """Write the results to each of the given files."""
        if json_file is not None:
            _write(json_file, json.dumps(self.as_dict(), indent=1))
        if markdown is not None:
            _write(markdown, self.markdown())
        if svg is not None:
            _write(svg, chart(self.summaries()))

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON values, complete, so that tables and plot can be made from them."""
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return {"environment": self.environment, "options": self.options.as_dict(), "outcomes": outcomes}


def _write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n", encoding="utf-8")
