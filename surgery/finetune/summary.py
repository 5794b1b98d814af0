"""What a run was and did: gathered from all ranks, written as `summary.json`, and said at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import patches
from surgery.comm.collectives import gather_objects
from surgery.errors import AdapterError
from surgery.finetune.attested import Attested
from surgery.finetune.options import Job
from surgery.finetune.session import Training
from surgery.telemetry.atomic import write_whole

__all__ = ["Phases", "Summary", "gather_phases", "patch_rows", "write_summary"]

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
    training: Training
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
        """For people: evaluations, attestation, memory per rank, patches."""
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


def gather_phases(phases: Phases) -> tuple[Phases, ...]:
    """The phases of every rank, on every rank; collective where there is a process group."""
    return tuple(gather_objects(phases))


def patch_rows(*, since: int = 0) -> tuple[dict[str, str], ...]:
    """Every application of a patch in this process, as text, the first `since` of them left out."""
    return tuple(
        {
            "id": row.id,
            "target": row.target,
            "state": str(row.state),
            "scope": str(row.scope),
            "verdict": str(row.verdict),
            "reason": row.reason,
            "by": row.by,
        }
        for row in patches.audit(include_reverted=True)[since:]
    )


def write_summary(summary: Summary, path: Path) -> None:
    """Write `summary` as JSON; a reader sees the old file or the new one, never a part.

    Raises `AdapterError` if that fails.
    """
    try:
        write_whole(path, summary.as_json())
    except OSError as error:
        raise AdapterError(f"the adapter is saved, but {path} cannot be written: {error.strerror or error}") from error
