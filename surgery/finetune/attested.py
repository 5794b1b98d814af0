"""`--attest`: a job shows at its start, in forward, and at its end that the base model is what was quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from surgery import attest, attesting
from surgery.attestation.differences import Attestation
from surgery.telemetry.report import Report

__all__ = ["Attested", "Attestor", "Check"]

#: Layers whose weights are compared in each watched forward, others each time; all are compared at rest.
SAMPLE = 8


@dataclass(frozen=True, kw_only=True)
class Check:
    """One attestation. when: `start`, `step N`, `end`, `saved`. where: `at rest` or `in forward`, of so many layers."""

    when: str
    where: str
    layers: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Attested:
    """What a job has shown; the digest is of all 4-bit layers as they were quantized, on any number of ranks."""

    digest: str
    checks: tuple[Check, ...]

    def text(self) -> str:
        """One line."""
        layers = max(check.layers for check in self.checks)
        forward = sum(check.where == "in forward" for check in self.checks)
        at_rest = ", ".join(check.when for check in self.checks if check.where == "at rest")
        return (
            f"Attestation: {layers} layers are what was quantized, at rest ({at_rest}) and in forward "
            f"({forward} times, samples); digest {self.digest}"
        )


@dataclass(kw_only=True, eq=False)
class Attestor:
    """Attests `model` when it is told to, unless it is not `enabled`. Collective; raises `AttestationError`."""

    model: nn.Module
    enabled: bool
    report: Report
    _digest: str = field(default="", init=False)
    _checks: list[Check] = field(default_factory=list, init=False)

    def at_rest(self, when: str) -> None:
        """Compare all shards and quant_states."""
        if not self.enabled:
            return
        with self.report.phase(f"attest-{when}", group="attest"):
            attestation = attest(self.model)
        self._digest = attestation.digest
        self._note(when, attestation)

    @contextmanager
    def in_forward(self, step: int) -> Iterator[None]:
        """A block in which the model runs, after so many steps: compare the weights of a sample of layers."""
        if not self.enabled:
            yield
            return
        with attesting(self.model, SAMPLE, seed=step) as watch:
            yield
        assert watch.attestation is not None
        self._note(f"step {step}", watch.attestation)

    def result(self) -> Attested | None:
        """What was shown so far; None if it is not enabled."""
        return Attested(digest=self._digest, checks=tuple(self._checks)) if self.enabled else None

    def _note(self, when: str, found: Attestation) -> None:
        check = Check(when=when, where=found.where, layers=len(found.layers), seconds=round(found.seconds, 4))
        self._checks.append(check)
