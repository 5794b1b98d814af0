"""Run passes in order, consecutive layer passes layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from surgery.errors import ConfigError
from surgery.passes.base import Layer, LayerPass, ModelPass, Naming
from surgery.report import Report

__all__ = ["Pipeline"]


def _nothing() -> None:
    """The default checkpoint between layers."""


def _no_layers(_model: nn.Module) -> tuple[Layer, ...]:
    """The default for a pipeline without layer passes."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Passes in order. It owns the layer loop: all consecutive layer passes finish one layer before the next begins.

    layers: what the layer passes visit.
    given: facts that hold before the first pass.
    between: called before every layer and every model pass; raises to stop, as when another rank has failed.
    """

    passes: tuple[ModelPass | LayerPass, ...]
    layers: Callable[[nn.Module], Iterable[Layer]] = _no_layers
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
        for by_layer, group in itertools.groupby(self.passes, lambda step: isinstance(step, LayerPass)):
            steps = tuple(group)
            model = self._run_layers(model, steps) if by_layer else self._run_model(model, steps)  # type: ignore[arg-type]
        return model

    def _run_model(self, model: nn.Module, steps: tuple[ModelPass, ...]) -> nn.Module:
        for step in steps:
            self.between()
            with self.report.phase(step.name), Naming(step.name, "the model"):
                model = step.run(model)
        return model

    def _run_layers(self, model: nn.Module, steps: tuple[LayerPass, ...]) -> nn.Module:
        with self.report.phase("+".join(step.name for step in steps)):
            for layer in self.report.track(list(self.layers(model)), describe=lambda layer: layer.fqn):
                self.between()
                for step in steps:
                    with Naming(step.name, layer.fqn):
                        step.run_layer(layer)
        return model
