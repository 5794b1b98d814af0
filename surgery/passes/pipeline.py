"""Run passes in order, consecutive layer passes layer by layer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from surgery.errors import ConfigError
from surgery.passes.base import Batch, BatchPass, MeetingPass, ModelPass, Naming
from surgery.telemetry.report import Report

__all__ = ["Pipeline"]


def _nothing() -> None:
    """The default checkpoint between layers."""


def _no_layers(_model: nn.Module) -> tuple[Batch, ...]:
    """The default for a pipeline without layer passes."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Passes in order. It owns the layer loop: all consecutive layer passes finish one layer before the next begins,
    but where ranks meet, the passes before are done with the next layer, so that a rank that is ahead need not wait.

    layers: what the layer passes visit.
    given: facts that hold before the first pass.
    between: called before every layer and every model pass; raises to stop, as when another rank has failed.
    """

    passes: tuple[ModelPass | BatchPass, ...]
    layers: Callable[[nn.Module], Iterable[Batch]] = _no_layers
    report: Report
    given: frozenset[str] = frozenset()
    between: Callable[[], None] = field(default=_nothing)

    def __post_init__(self) -> None:
        ensured = set(self.given)
        for step in self.passes:
            lacking = sorted(step.requires - ensured)
            if lacking:
                raise ConfigError(f"pass {step.name} requires {', '.join(lacking)}, which no earlier pass ensures")
            ensured |= step.ensures

    def run(self, model: nn.Module) -> nn.Module:
        """`model` after all passes. A failure is a `PassError` that names the pass and the FQN."""
        for by_layer, group in itertools.groupby(self.passes, lambda step: isinstance(step, BatchPass)):
            steps = tuple(group)
            model = self._run_layers(model, steps) if by_layer else self._run_model(model, steps)  # type: ignore[arg-type]
        return model

    def _run_model(self, model: nn.Module, steps: tuple[ModelPass, ...]) -> nn.Module:
        for step in steps:
            self.between()
            with self.report.phase(step.name), Naming(step.name, "the model"):
                model = step.run(model)
        return model

    def _run_layers(self, model: nn.Module, steps: tuple[BatchPass, ...]) -> nn.Module:
        ahead, behind = _split(steps)
        with self.report.phase("+".join(step.name for step in steps)):
            waiting: Batch | None = None
            for layer in self.report.track(list(self.layers(model)), describe=lambda layer: layer.fqn):
                with _keeping_a_promise(behind, waiting):
                    self.between()
                    _run(ahead, layer)
                _run(behind, waiting)
                waiting = None
                for step in behind[:1]:
                    step.arrive(layer)  # type: ignore[attr-defined]  # the first one is the meeting pass
                    waiting = layer
            _run(behind, waiting)
        return model


def _split(steps: tuple[BatchPass, ...]) -> tuple[tuple[BatchPass, ...], tuple[BatchPass, ...]]:
    """The passes before the first `MeetingPass`, and from it on."""
    meetings = [number for number, step in enumerate(steps) if isinstance(step, MeetingPass)]
    first = meetings[0] if meetings else len(steps)
    return steps[:first], steps[first:]


def _run(steps: tuple[BatchPass, ...], layer: Batch | None) -> None:
    """All `steps` on `layer`, if there is one."""
    for step in steps if layer is not None else ():
        assert layer is not None
        with Naming(step.name, layer.fqn):
            step.run_batch(layer)


@contextlib.contextmanager
def _keeping_a_promise(behind: tuple[BatchPass, ...], waiting: Batch | None) -> Iterator[None]:
    """Where the block fails, the others may have begun with the layer `waiting`, since this rank has arrived there: it
    takes part, or finds that they do not, before the failure goes on its way.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):
            _run(behind, waiting)
        raise
