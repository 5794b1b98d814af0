"""Records of a run: attestations, the model card, and the summary that is gathered from all ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from torch import nn

import model_surgery_patches as patches
from surgery import attest, attesting
from surgery.attestation.differences import Attestation
from surgery.errors import AdapterError
from surgery.finetune.dataset import Plan
from surgery.finetune.loop import TrainingResult
from surgery.finetune.options import Job
from surgery.telemetry.atomic import write_whole
from surgery.telemetry.report import Report

__all__ = ["Attested", "Attestor", "Check", "Phases", "Summary", "card_sections", "patch_rows", "write_summary"]

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
    """Attestations of a job; the digest is of all 4-bit layers as quantized, the same on any number of ranks."""

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
        """Attestations so far; None if they are not enabled."""
        return Attested(digest=self._digest, checks=tuple(self._checks)) if self.enabled else None

    def _note(self, when: str, found: Attestation) -> None:
        check = Check(when=when, where=found.where, layers=len(found.layers), seconds=round(found.seconds, 4))
        self._checks.append(check)


def card_sections(job: Job, plan: Plan, training: TrainingResult, world_size: int) -> dict[str, Mapping[str, object]]:
    """Rows by title of a section. Files are named without their folders, which are nobody else's business."""
    data, evaluations = plan.dataset, training.evaluations
    files = {"file": job.data.train.name, "evaluation file": job.data.evaluation and job.data.evaluation.name}
    options = {"training": job.training, "quant": job.quant, "shard": job.shard if world_size > 1 else None}
    settings = {
        name: value for group, of in options.items() if of is not None for name, value in _option_rows(group, of)
    }
    return {
        "Data": {
            **files,
            "training samples": len(data.train),
            "evaluation samples": len(data.evaluation),
            "max_length": job.data.max_length,
            "SHA-256 of all tokens": data.digest(),
        },
        "Settings": {
            "ranks": world_size,
            "precision": job.precision,
            "global batch": plan.batch,
            "steps": plan.schedule.steps,
            **settings,
        },
        "Losses": {
            "first step": training.losses[0] if training.losses else None,
            "last step": training.losses[-1] if training.losses else None,
            "evaluation": [f"{each.loss:.4f} after step {each.step}" for each in evaluations] or None,
        },
    }


def _option_rows(group: str, options: object) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(options):
        yield from ((f"{group}.{field.name}", getattr(options, field.name)) for field in dataclasses.fields(options))


#: Phase -> seconds, and bytes of memory before and at the peak, of one rank.
Phases: TypeAlias = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run; the same on every rank.

    sharding: `FSDP1` or `FSDP2`; None in one process. placement: see `surgery.qlora`.
    memory: phases of each rank, in the order of ranks.
    read_once_per_node: checkpoint tensors that one rank of each node has read and converted; see `surgery.Report`.
    ignored, initialized, misread: names of the checkpoint that were not used, of buffers that it lacks, and of weights
        that this CPU dequantizes wrongly; see `surgery.Report`.
    patches: one row for each time that a patch was applied, or skipped because the installed versions do not
        need it.
    """

    config: Job
    device: str
    world_size: int
    sharding: str | None
    placement: str
    samples: Mapping[str, int]
    training: TrainingResult
    memory: tuple[Phases, ...]
    read_once_per_node: Mapping[str, int]
    ignored: Mapping[str, int]
    initialized: Mapping[str, int]
    misread: Mapping[str, int]
    patches: tuple[Mapping[str, str], ...]
    versions: Mapping[str, str]
    attestation: Attested | None = None

    @property
    def patches_left(self) -> tuple[str, ...]:
        """Ids of the patches that are still in force, in any way."""
        return tuple(row["id"] for row in self.patches if row["state"] not in ("reverted", "skipped"))

    def as_json(self) -> str:
        """One object: the fields, with those of `training` beside them, and `patches_left`."""
        fields = dataclasses.asdict(self)
        training = fields.pop("training")
        return json.dumps({**fields, **training, "patches_left": self.patches_left}, indent=2, default=str) + "\n"

    def text(self) -> str:
        """Summary for people: evaluations, attestation, memory per rank, patches."""
        attestation = self.attestation.text() if self.attestation is not None else ""
        return "\n\n".join(filter(None, (self._evaluations(), attestation, self._memory(), self._patches())))

    def _evaluations(self) -> str:
        if not self.training.evaluations:
            return ""
        first, last = self.training.evaluations[0], self.training.evaluations[-1]
        return f"Evaluation loss: {first.loss:.4f} before training, {last.loss:.4f} after step {last.step}"

    def _memory(self) -> str:
        lines = ["Peak memory of each phase, MiB (host, anonymous; device)"]
        for rank, phases in enumerate(self.memory):
            figures = ", ".join(f"{name} {_mib(phase)}" for name, phase in phases.items())
            lines.append(f"  rank {rank}: {figures}")
        return "\n".join(lines)

    def _patches(self) -> str:
        width = max((len(row["id"]) for row in self.patches), default=0)
        rows = [
            f"  {row['id']:<{width}}  {row['state']}, {row['verdict']}, on {row['scope']}: {row['target']}"
            for row in self.patches
        ]
        left = ", ".join(self.patches_left)
        return "\n".join(["Patches of this run", *rows, f"Patches still active: {left or 'none'}"])


def _mib(phase: Mapping[str, float]) -> str:
    host, device = phase["host_peak"] / 2**20, phase["device_peak"] / 2**20
    return f"{host:,.0f}; {device:,.0f}" if device else f"{host:,.0f}"


def patch_rows(*, since: int = 0) -> tuple[dict[str, str], ...]:
    """Every application of a patch in this process, as text, the first `since` of them left out."""
    names = ("id", "target", "state", "scope", "verdict", "reason", "by")
    rows = patches.audit(include_reverted=True)[since:]
    return tuple({name: str(getattr(row, name)) for name in names} for row in rows)


def write_summary(summary: Summary, path: Path) -> None:
    """Write `summary` as JSON; a reader sees the old file or the new one, never a part.

    Raises `AdapterError` if that fails.
    """
    try:
        write_whole(path, summary.as_json())
    except OSError as error:
        raise AdapterError(f"the adapter is saved, but {path} cannot be written: {error.strerror or error}") from error
