"""Records of a run: the summary that is gathered from all ranks, the model card, and the command to go on with."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import model_surgery_patches as patches
from surgery.errors import AdapterError
from surgery.finetune.callbacks import Attested
from surgery.telemetry.atomic import write_whole

__all__ = ["Evaluation", "Phases", "Summary", "card_sections", "patch_rows", "write_summary"]

#: Phase -> seconds, and bytes of memory before and at the peak, of one rank.
Phases: TypeAlias = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean token loss on the evaluation samples after so many steps; 0 is before training."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run; the same on every rank.

    config: every option by its name. sharding: `FSDP1`, `FSDP2` or `DDP`; None in one process.
    losses: as logged, by step. memory: phases of each rank, in the order of ranks.
    patches: one row for each time that a patch was applied, or skipped because the installed versions do not
        need it.
    """

    config: Mapping[str, Any]
    device: str
    world_size: int
    sharding: str | None
    samples: Mapping[str, int | None]
    steps: int
    resumed_after: int
    seconds: float
    losses: Mapping[int, float]
    evaluations: Sequence[Evaluation]
    memory: tuple[Phases, ...]
    patches: tuple[Mapping[str, str], ...]
    versions: Mapping[str, str]
    attestation: Attested | None = None

    @property
    def patches_left(self) -> tuple[str, ...]:
        """Ids of the patches that are still in force, in any way."""
        return tuple(row["id"] for row in self.patches if row["state"] not in ("reverted", "skipped"))

    @property
    def next_command(self) -> str:
        """The command that shows what was trained."""
        words = ["surgery", "generate", self.config["model_name_or_path"], "--adapter", self.config["output_dir"]]
        return shlex.join([*words, "--prompt", "..."])

    def as_json(self) -> str:
        """One object: the fields, `patches_left` and `next_command`."""
        fields = {**dataclasses.asdict(self), "patches_left": self.patches_left, "next_command": self.next_command}
        return json.dumps(fields, indent=2, default=str) + "\n"

    def text(self) -> str:
        """Summary for people: losses, attestation, memory per rank, patches, what to do next."""
        attestation = self.attestation.text() if self.attestation is not None else ""
        parts = (self._losses(), attestation, self._memory(), self._patches(), self._next())
        return "\n\n".join(filter(None, parts))

    def _losses(self) -> str:
        resumed = f", resumed after step {self.resumed_after}" if self.resumed_after else ""
        lines = [f"Steps: {self.steps} in {self.seconds:.0f} s; ranks: {self.world_size}{resumed}"]
        losses = list(self.losses.values())
        if losses:
            lines.append(f"Training loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
        if len(self.evaluations) > 1:
            first, last = self.evaluations[0], self.evaluations[-1]
            before = "before training" if not first.step else f"after step {first.step}"
            lines.append(f"Evaluation loss: {first.loss:.4f} {before}, {last.loss:.4f} after step {last.step}")
        return "\n".join(lines)

    def _memory(self) -> str:
        lines = ["Peak memory of each phase, MiB (host, anonymous; device)"]
        for rank, phases in enumerate(self.memory):
            figures = ", ".join(f"{name} {_mib(phase)}" for name, phase in phases.items())
            lines.append(f"  rank {rank}: {figures}")
        return "\n".join(lines)

    def _patches(self) -> str:
        count = len({row["id"] for row in self.patches if row["state"] != "skipped"})
        left = ", ".join(self.patches_left)
        return f"Patches of this run: {count}, which summary.json lists\nPatches still active: {left or 'none'}"

    def _next(self) -> str:
        return f"Adapter and summary: {self.config['output_dir']}\nTry it: {self.next_command}"


def _mib(phase: Mapping[str, float]) -> str:
    host, device = phase["host_peak"] / 2**20, phase["device_peak"] / 2**20
    return f"{host:,.0f}; {device:,.0f}" if device else f"{host:,.0f}"


#: Options of the model card's section on settings.
_SETTINGS = (
    "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "optim", "weight_decay", "max_grad_norm", "seed", "dtype", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "bnb_4bit_quant_storage", "experts", "kernels", "fsdp", "mesh", "packing", "beta",
    "loss_type",
)  # fmt: skip


def card_sections(summary: Summary, facts: Mapping[str, str]) -> dict[str, Mapping[str, object]]:
    """Rows by title of a section. Files are named without their folders, which are nobody else's business."""
    config, losses = summary.config, list(summary.losses.values())
    names = [Path(each).name if Path(each).exists() else each for each in config["data"]]
    return {
        "Data": {"sources": names, **{f"{name} samples": count for name, count in summary.samples.items()}, **facts},
        "Settings": {
            "ranks": summary.world_size,
            "sharding": summary.sharding,
            "steps": summary.steps,
            **{name: config[name] for name in _SETTINGS if config.get(name) is not None},
        },
        "Losses": {
            "first step": losses[0] if losses else None,
            "last step": losses[-1] if losses else None,
            "evaluation": [f"{each.loss:.4f} after step {each.step}" for each in summary.evaluations] or None,
        },
    }


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
