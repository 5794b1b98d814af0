"""Run a job: check everything, build the model, train it, save the adapter, and undo every patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

import model_surgery_patches as patches
from surgery import plan as memory_plan
from surgery import qlora, release, reserve, save_adapter, trace
from surgery.adapters.metadata import versions
from surgery.checkpoint import Checkpoint
from surgery.comm.collectives import gather_objects
from surgery.comm.comparison import Facts, facts_of, same_on_every_rank
from surgery.comm.failures import everyone
from surgery.config import precision
from surgery.errors import ConfigError
from surgery.finetune.dataset import Plan, make_plan, read_data
from surgery.finetune.loop import Session, Tracker, Trainer, TrainingResult, build_optimizer
from surgery.finetune.options import Job
from surgery.finetune.summary import (
    Attested,
    Attestor,
    Summary,
    card_sections,
    patch_rows,
    write_summary,
)
from surgery.finetune.trackers import ProgressTracker, close_with, open_trackers
from surgery.finetune.world import World, join_world
from surgery.model.checkpointing import checkpoint_activations
from surgery.model.consistency import source_facts
from surgery.planning.training import Training
from surgery.planning.verdict import predictions
from surgery.sharding.base import ShardStrategy, strategy_for, strategy_of
from surgery.telemetry.report import Report, anonymous_memory
from surgery.tracing.folder import PAGE, start_afresh

__all__ = ["run"]


def run(job: Job, *, console: Console | None = None) -> Summary:
    """Fine-tune as `job` says; to be called on all ranks alike.

    Rank 0 shows progress on `console` (default: stdout), and keeps `job.output` from other jobs. Seeds torch's global
    generator. On return, and on any exception, `KeyboardInterrupt` included, the patches that the job applied are
    undone; the adapter in `job.output` is replaced only if training has finished.

    Raises:
        DataError, ConfigError, CheckpointError: before any weight is read.
        AdapterError: the adapter cannot be saved; what was in `job.output` is as it was.
        PassError, PeerError: the model could not be built, here or on another rank.
        TrainingError: the loss is not finite.
        AttestationError: 4-bit weights are not what was quantized; nothing is saved unless that was found afterwards.
    """
    console = console or Console()
    earlier = len(patches.audit(include_reverted=True))
    with (
        join_world(timeout=job.timeout) as world,
        # First of all: what is found out after training is found out too late.
        reserve(job.output, overwrite=job.overwrite, device=world.device),
    ):
        checkpoint, plan = _prepare(job, world)
        untraced = nullcontext(Report(show_progress=world.is_main, device=world.device))
        with untraced if job.trace is None else trace(job.trace, device=world.device) as report:
            with _trackers(job, plan, world, console) as trackers:
                training, attested = _train(job, checkpoint, plan, world=world, trackers=trackers, report=report)
            summary = Summary(
                config=job,
                device=str(world.device),
                world_size=world.size,
                sharding=_strategy(job, world).label if world.size > 1 else None,
                placement=_strategy(job, world).placement,
                samples={
                    "train": len(plan.dataset.train),
                    "evaluation": len(plan.dataset.evaluation),
                    "cut": plan.dataset.cut,
                    "dropped": plan.dataset.dropped,
                },
                training=training,
                memory=tuple(gather_objects(report.as_dict())),
                read_once_per_node=report.read_once_per_node,
                ignored=report.ignored,
                initialized=report.initialized,
                misread=report.misread,
                patches=patch_rows(since=earlier),
                versions=versions(),
                attestation=attested,
            )
            if world.is_main:
                write_summary(summary, job.output / "summary.json")
    if world.is_main:
        _say(console, summary.text())
        _say(console, f"Adapter and summary: {job.output}")
        if job.trace is not None:
            _say(console, f"Trace: {job.trace / PAGE}")
    return summary


def _prepare(job: Job, world: World) -> tuple[Checkpoint, Plan]:
    """The open checkpoint and the plan; if one rank cannot have them, or has others, all raise."""
    # What decides how ranks work together; what decides of the model is compared when it is built.
    options: dict[str, Facts] = {
        "training options": facts_of(job.training),
        "precision": {"name": job.precision},
        "attestation": {"asked for": str(job.attest)},
        "checkpoint": source_facts(job.model),
    }
    same_on_every_rank(world.ranks, "options", options, device=world.device)
    with everyone(world.ranks, device=world.device):
        _check_world(job, world)
        if job.trace is not None:
            start_afresh(job.trace, rank=world.rank, world_size=world.size)
        # Before the checkpoint, which may have to be downloaded, and the tokenizer, which takes seconds.
        records = read_data(job.data)
    with everyone(world.ranks, device=world.device):
        # Collective for a hub id, and then it fails on all ranks or on none, so that they meet here all the same.
        checkpoint = Checkpoint.open(job.model, revision=job.revision)
        plan = make_plan(job, *records, checkpoint, world=world.size)
    # Each rank takes its part of the samples, and counts the tokens of a step, from the whole by itself.
    data = {"digest of all tokens": plan.dataset.digest(), "padding": str(plan.pad)}
    same_on_every_rank(world.ranks, "data", {"data": data}, device=world.device)
    return checkpoint, plan


def _check_world(job: Job, world: World) -> None:
    if world.size == 1 and job.shard != type(job.shard)():
        raise ConfigError(
            f"expected more than one rank for {job.shard}, found a single process; start it with "
            "torchrun --nproc-per-node N -m surgery finetune ..., or leave out the options of sharding"
        )
    if world.size == 1 or not job.lora.dora:
        return
    if not getattr(job.shard, "use_orig_params", True):
        raise ConfigError(
            "DoRA reads the base weight while the adapter runs, but with flat parameters adapters are FSDP1 units of "
            "their own and the base weight is already freed: add --use-orig-params, or leave out --dora"
        )
    if _strategy(job, world).partition.grid.shards > 1:
        raise ConfigError(
            "DoRA computes its magnitudes from whole base weights, which ranks do not have with --low-memory: add "
            "--no-low-memory, or leave out --dora"
        )


def _strategy(job: Job, world: World) -> ShardStrategy:
    """The sharding of the model; in one process none. Mixed precision defaults to the precision policy."""
    if world.size == 1:
        return strategy_for(None, device=world.device)
    options = job.shard.in_precision(precision(job.precision))
    return strategy_for(options, world_size=world.size, device=world.device, placement=job.placement)


@contextmanager
def _trackers(job: Job, plan: Plan, world: World, console: Console) -> Iterator[Sequence[Tracker]]:
    """Open what rank 0 reports to; the others report to nobody, and leave if rank 0 cannot open what it needs."""
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        with everyone(world.ranks, device=world.device):
            if world.is_main:
                _announce(job, plan, world, console)
                config = dataclasses.asdict(job)
                trackers += open_trackers(
                    metrics=job.metrics, loggers=job.loggers, output=job.output, config=config, stack=stack
                )
                progress = ProgressTracker(console, steps=plan.schedule.steps, memory=_memory_in_use(world.device))
                trackers.append(close_with(stack, progress))
        yield trackers


def _train(
    job: Job, checkpoint: Checkpoint, plan: Plan, *, world: World, trackers: Sequence[Tracker], report: Report
) -> tuple[TrainingResult, Attested | None]:
    """Build the model, train it and save the adapter, with attestations if they were asked for.

    The model's patches are undone, whatever happens.
    """
    torch.manual_seed(job.training.seed)
    model = _build(job, checkpoint, world, report)
    try:
        # Adapters begin alike on every rank, but each drops out its own.
        torch.manual_seed(job.training.seed + world.rank)
        attestor = Attestor(model=model, enabled=job.attest, report=report)
        session = Session(
            trainer=_trainer(job, model, plan, world),
            plan=plan,
            options=job.training,
            rank=world.rank,
            world=world.size,
            trackers=trackers,
            watch=attestor.in_forward,
        )
        attestor.at_rest("start")
        with report.phase("train", group="train"):
            training = session.run()
        attestor.at_rest("end")
        with report.phase("save", group="save"):
            save_adapter(model, job.output, training=card_sections(job, plan, training, world.size))
        attestor.at_rest("saved")
    finally:
        release(model)
    return training, attestor.result()


def _build(job: Job, checkpoint: Checkpoint, world: World, report: Report) -> nn.Module:
    """The model; if there is a trace, the peak that the plan expects of a training step is in it."""
    policy = precision(job.precision)
    strategy = _strategy(job, world)
    recipe: dict[str, Any] = {
        "quant": job.quant,
        "lora": job.lora.config(),
        "placement": strategy.placement,
        "shard": strategy.options,
        "dtype": policy.dtype,
        "compute_dtype": policy.compute_dtype,
    }
    if job.trace is not None:
        training = Training(
            batch=job.training.batch_size,
            seq=job.data.max_length,
            optimizer=job.training.optimizer,
            checkpointing=job.training.activation_checkpointing != "none",
        )
        device = world.device.type
        expected = memory_plan(checkpoint, world_size=world.size, device=device, training=training, **recipe)
        peaks = predictions(expected, world.rank)["train"]
        report.predict("train", host=peaks[0], device=peaks[1])
    return qlora(checkpoint, device=world.device, report=report, **recipe)


def _trainer(job: Job, model: nn.Module, plan: Plan, world: World) -> Trainer:
    options, policy = job.training, precision(job.precision)
    if options.activation_checkpointing != "none":
        reentrant = options.activation_checkpointing == "reentrant"
        checkpoint_activations(model, reentrant=reentrant, offload=options.activation_offload)
    strategy = strategy_of(model, world.device)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, options.optimizer, lr=options.lr, weight_decay=options.weight_decay),
        strategy=strategy,
        schedule=plan.schedule,
        scaler=strategy.grad_scaler(enabled=policy.grad_scaler),
        device=world.device,
        autocast=policy.autocast,
        max_norm=options.clip,
    )


def _announce(job: Job, plan: Plan, world: World, console: Console) -> None:
    data = plan.dataset
    _say(
        console,
        f"{len(data.train)} samples to train on, {len(data.evaluation)} to evaluate on; "
        f"{plan.schedule.steps} steps of {plan.batch} samples on {world.size} rank(s), {world.device.type}",
    )
    if data.cut:
        _say(console, f"Warning: {data.cut} samples are cut off: they are longer than {job.data.max_length} tokens")
    if data.dropped:
        _say(console, f"Warning: {data.dropped} samples are left out: nothing to learn remains of them")


def _say(console: Console, text: str) -> None:
    """Print as it is: no markup in paths and names, no line breaks of our own."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _memory_in_use(device: torch.device) -> Callable[[], int]:
    """A function that gives the bytes in use: of the GPU, or of anonymous memory without one."""
    return partial(torch.cuda.memory_allocated, device) if device.type == "cuda" else anonymous_memory
