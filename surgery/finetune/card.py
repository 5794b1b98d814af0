"""What the model card says of a job: its data, its settings, its losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from surgery.finetune.options import Job
from surgery.finetune.prepare import Plan
from surgery.finetune.session import Training

__all__ = ["card_sections"]


def card_sections(job: Job, plan: Plan, training: Training, world_size: int) -> dict[str, Mapping[str, object]]:
    """Rows by title of a section. Files are named without their folders, which are nobody else's business."""
    data, evaluations = plan.dataset, training.evaluations
    files = {"file": job.data.train.name, "evaluation file": job.data.evaluation and job.data.evaluation.name}
    options = {"training": job.training, "quant": job.quant, "shard": job.shard if world_size > 1 else None}
    settings = {name: value for group, of in options.items() if of is not None for name, value in _rows(group, of)}
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


def _rows(group: str, options: object) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(options):
        yield from ((f"{group}.{field.name}", getattr(options, field.name)) for field in dataclasses.fields(options))
