"""Scripts on one rank, each as it is and then inside of `surgery.low_memory()`, in one process."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_surgery_patches as patches
import surgery
from trials.observed import observe

__all__ = ["Run", "Script", "on_a_rank"]

WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "stock": contextlib.nullcontext,
    "ours": surgery.low_memory,
}


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script and its arguments, in which `{out}` stands for a folder to write into, `{other}` for the other way."""

    path: Path
    arguments: tuple[str, ...]


@dataclass(kw_only=True)
class Run:
    """What one run did on one rank. kinds: parameters by dtype, at each `prepare`."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    kinds: list[dict[str, int]] = field(default_factory=list)
    parameter_bytes: list[int] = field(default_factory=list)
    failure: str | None = None


def on_a_rank(scripts: dict[str, Script], folder: Path) -> dict[str, dict[str, Run]]:
    """Run all; script -> way -> what it did. Output goes to `folder / script / way`."""
    runs = [Run()]

    def record(event: str, **values: Any) -> None:
        run = runs[-1]
        if event == "loss":
            run.losses.append(values["value"])
        elif event == "prepare":
            run.kinds.append(values["parameters"])
        elif event == "from_pretrained":
            run.parameter_bytes.append(values["parameter_bytes"])
        elif event == "log" and "eval_loss" in values["logs"]:
            run.evaluations.append(values["logs"]["eval_loss"])

    observe(record)
    found: dict[str, dict[str, Run]] = {}
    for name, script in scripts.items():
        for (way, block), other in zip(WAYS.items(), reversed(WAYS), strict=True):
            runs.append(Run())
            with _fresh(), patches.transaction("accelerate.fsdp-on-cpu", reason="no GPU here"), block():
                runs[-1].failure = _run(script, folder / name / way, other)
            found.setdefault(name, {})[way] = runs[-1]
    return found


def _run(script: Script, out: Path, other: str) -> str | None:
    given = (argument.replace("{out}", str(out)).replace("{other}", other) for argument in script.arguments)
    sys.argv = [str(script.path), *given]
    try:
        runpy.run_path(str(script.path), run_name="__main__")
    except Exception:  # noqa: BLE001  # the scripts after it are run nevertheless
        return traceback.format_exc()
    return None


@contextlib.contextmanager
def _fresh() -> Iterator[None]:
    """Give back the environment that a script has found, and the state that accelerate keeps for a process."""
    from accelerate.state import AcceleratorState, GradientState

    before = dict(os.environ)
    os.environ["FORK_LAUNCHED"] = "1"  # so that accelerate leaves the process group to whom it belongs
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
