"""The findings of all ranks, written to a file as they come, and printed as a table at the end."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["WHOLE", "Findings", "Outcome", "attempt"]

#: `error`: None or the error, with its `traceback`; `seconds`: duration; all other keys belong to the part.
Outcome = dict[str, Any]

#: The name under which the completion or failure of a part is recorded.
WHOLE = "whole"

MIB = 1024 * 1024


def attempt(function: Callable[[], dict[str, Any] | None]) -> Outcome:
    """Run `function`; returns its result, if any, or the error that it raised."""
    start = time.perf_counter()
    try:
        outcome = {"error": None, **(function() or {})}
    except Exception as error:  # noqa: BLE001  # any error is reported, and the next part runs
        outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**outcome, "seconds": round(time.perf_counter() - start, 3)}


@dataclass(kw_only=True)
class Findings:
    """Part -> name -> outcomes by rank. `file`, if any, is written after each, so that a crash loses little."""

    file: Path | None
    environment: dict[str, Any]
    parts: dict[str, dict[str, list[Outcome]]] = field(default_factory=dict)

    def add(self, part: str, name: str, outcomes: list[Outcome]) -> None:
        """Record the outcomes of all ranks."""
        self.parts.setdefault(part, {})[name] = outcomes
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": self.environment, **self.parts}
        self.file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        verdict = "FAILED" if any(outcome["error"] for outcome in outcomes) else "ok"
        print(f"{part:12} {name:28} {verdict:6} {max(outcome['seconds'] for outcome in outcomes):8.2f} s", flush=True)

    def failures(self) -> dict[str, Outcome]:
        """Everything that failed, by part, name and rank."""
        return {
            f"{part} {name}, rank {rank}": outcome
            for part, by_name in self.parts.items()
            for name, outcomes in by_name.items()
            for rank, outcome in enumerate(outcomes)
            if outcome["error"]
        }

    def print_summary(self) -> None:
        """Print the environment, the largest errors of exactness, a line per rank of training, and the failures."""
        print("\n" + json.dumps(self.environment))
        self._print_exactness()
        self._print_training()
        self._print_failures()

    def _print_failures(self) -> None:
        """Print every error once, with its location; all tracebacks are in the file."""
        alike: dict[str, list[str]] = {}
        for where, outcome in self.failures().items():
            alike.setdefault(outcome["error"], []).append(where)
        for error, places in alike.items():
            others = f" and {len(places) - 3} more" if len(places) > 3 else ""
            print(f"FAILED {'; '.join(places[:3])}{others}\n       {error:.500}")
            print("".join(self.failures()[places[0]]["traceback"].splitlines(keepends=True)[-6:]))

    def _print_exactness(self) -> None:
        by_name = self.parts.get("exactness", {})
        outcomes = [outcome for name, by_rank in by_name.items() if name != WHOLE for outcome in by_rank]
        exact = [outcome for outcome in outcomes if not outcome["error"] and "loss_error" in outcome]
        if not exact:
            return
        loss, gradient = (max(outcome[key] for outcome in exact) for key in ("loss_error", "gradient_error"))
        print(f"exactness: {len(exact)} of {len(outcomes)} outcomes equal upstream's single process;")
        print(f"           worst relative error of a loss {loss:.1e}, of a gradient {gradient:.1e}")

    def _print_training(self) -> None:
        lines = [
            (placement, rank, outcome)
            for placement, outcomes in self.parts.get("training", {}).items()
            for rank, outcome in enumerate(outcomes)
            if "losses" in outcome
        ]
        if lines:
            print("placement   rank  load s  load MiB  held MiB  train MiB  host MiB  step s  losses")
        for placement, rank, found in lines:
            sizes = (found[key] // MIB for key in ("load_peak", "held", "train_peak", "host_peak"))
            memory = "{:9} {:9} {:10} {:9}".format(*sizes)
            step = min(found["step_seconds"])
            losses = f"{found['losses'][0]:.4f} to {found['losses'][-1]:.4f}"
            print(f"{placement:11} {rank:4} {found['load_seconds']:7.2f} {memory} {step:7.3f}  {losses}")
            print(f"{'':16} " + ", ".join(f"{name} {p['seconds']:.2f} s" for name, p in found["phases"].items()))
