"""What the memory plan expects of training, noted in the report that is traced."""

from __future__ import annotations

from surgery import plan
from surgery.checkpoint import Checkpoint
from surgery.config import precision
from surgery.finetune.options import Job
from surgery.finetune.world import World
from surgery.planning.training import Training
from surgery.planning.verdict import predictions
from surgery.sharding.base import ShardStrategy
from surgery.telemetry.report import Report

__all__ = ["predict_training"]


def predict_training(job: Job, checkpoint: Checkpoint, world: World, report: Report, strategy: ShardStrategy) -> None:
    """Note the peak of a training step of `job`, with samples of its maximum length, in `report`."""
    policy = precision(job.precision)
    training = Training(
        batch=job.training.batch_size,
        seq=job.data.max_length,
        optimizer=job.training.optimizer,
        checkpointing=job.training.activation_checkpointing != "none",
    )
    expected = plan(
        checkpoint,
        world_size=world.size,
        quant=job.quant,
        lora=job.lora.config(),
        placement=strategy.placement,
        shard=strategy.options,
        dtype=policy.dtype,
        compute_dtype=policy.compute_dtype,
        device=world.device.type,
        training=training,
    )
    host, device = predictions(expected, world.rank)["train"]
    report.predict("train", host=host, device=device)
