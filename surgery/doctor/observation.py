"""Observation of a script that runs: calls through each patch, and memory until its first optimizer step."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import model_surgery_patches as patches
from surgery.planning.arguments import QuantType
from surgery.run import ExitCode, low_memory, run_as_main
from surgery.telemetry.measurements import SAMPLE_PERIOD, Sampler, anonymous_memory

__all__ = ["Acted", "FirstStep", "Observation", "observe"]

COUNT = "PATCHES_COUNT"


@dataclass(frozen=True, kw_only=True)
class Acted:
    """Calls through one patch; it acted on those that it has not passed through. state: when the script had ended."""

    id: str
    calls: int
    passed: int
    state: str

    @property
    def acted(self) -> int:
        """Number of calls on which it acted."""
        return self.calls - self.passed


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """The moment after the first optimizer step. Peaks in bytes, on the host of anonymous memory above what was held.

    seconds: since the script began. device_peak: of what torch's allocator gave out; 0 without a GPU. mesh: dimensions
    of the device mesh by name, empty if the optimizer's parameters are not sharded.
    """

    seconds: float
    host_peak: int
    device_peak: int
    mesh: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The exit code of a script, its patches in the order of application, and its first step, if it came to that."""

    code: ExitCode
    acted: tuple[Acted, ...]
    first_step: FirstStep | None

    @property
    def failed(self) -> bool:
        """Whether the script has ended as one that failed."""
        return self.code not in (None, 0)

    def has_acted(self, ids: Collection[str]) -> bool:
        """Whether any of these patches has acted on a call."""
        return any(each.acted for each in self.acted if each.id in ids)


@dataclass(kw_only=True)
class _Watch:
    """Peaks until the first step of any optimizer."""

    before: int = field(default_factory=anonymous_memory)
    began: float = field(default_factory=time.monotonic)
    host_peak: int = 0
    step: FirstStep | None = None

    def look(self) -> None:
        self.host_peak = max(self.host_peak, anonymous_memory() - self.before)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        if self.step is not None:
            return
        self.look()
        self.step = FirstStep(
            seconds=time.monotonic() - self.began,
            host_peak=self.host_peak,
            device_peak=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            mesh=_mesh(optimizer.param_groups[0]["params"]),
        )


def observe(
    command: Sequence[str], apply: Sequence[str] | None = None, experts: QuantType | None = None
) -> Observation:
    """Run a script as `surgery run` does, and look at it."""
    watch = _Watch()
    hook = register_optimizer_step_post_hook(watch.after_step)
    try:
        with _counting(), Sampler(SAMPLE_PERIOD).calling(watch.look), low_memory(apply, experts):
            before = patches.audit(include_reverted=True)  # which have been called to verify that they apply
            code = run_as_main(command)
    finally:
        hook.remove()
    return Observation(code=code, acted=_acted_since(before), first_step=watch.step)


@contextmanager
def _counting() -> Iterator[None]:
    """Count calls of every patch that is applied in the block, whoever applies it."""
    before = os.environ.get(COUNT)
    os.environ[COUNT] = "1"
    try:
        yield
    finally:
        os.environ.pop(COUNT)
        os.environ.update({} if before is None else {COUNT: before})


def _acted_since(before: Sequence[Any]) -> tuple[Acted, ...]:
    """The patches whose calls were counted, without the calls of `before`, whose rows still come first.

    Of several receipts of one patch, each may count the calls of all.
    """
    found: dict[str, Acted] = {}
    for row, earlier in zip_longest(patches.audit(include_reverted=True), before):
        if row.calls is None:
            continue
        calls, passed = (earlier.calls or 0, earlier.passed or 0) if earlier is not None else (0, 0)
        passed, calls = (row.passed or 0) - passed, row.calls - calls
        acted = Acted(id=row.id, calls=calls, passed=passed, state=str(row.state))
        found[row.id] = max(found.get(row.id, acted), acted, key=lambda each: each.calls)
    return tuple(found.values())


def _mesh(parameters: Sequence[Any]) -> dict[str, int]:
    from torch.distributed.tensor import DTensor

    mesh = next((each.device_mesh for each in parameters if isinstance(each, DTensor)), None)
    if mesh is None:
        return {}
    names = mesh.mesh_dim_names or tuple(f"dimension {number}" for number in range(mesh.ndim))
    return dict(zip(names, mesh.shape, strict=True))
