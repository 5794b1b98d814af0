"""Measure one way on the ranks of this job; rank 0 writes what was found after each stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import surgery
from experts.ways import LOADERS, Case
from loading.batches import Batch
from loading.loops import adamw, plain_step
from loading.outcome import describe
from loading.profiling import profile
from loading.world import World, joined
from surgery.comm.collectives import gather_objects
from surgery.telemetry.report import Report

__all__ = ["Found", "Options", "measure"]

SEED = 0
READY = "ready"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one way.

    batches: those with checkpointing last, for it stays. memory_cap: GiB of each GPU. profile: a folder for a profile
    of steps on the first batch.
    """

    way: str
    checkpoint: str
    ranks: int
    device: str
    batches: tuple[str, ...]
    steps: int
    lora_rank: int
    double_quant: bool
    memory_cap: float | None
    profile: str | None


@dataclass(kw_only=True)
class Found:
    """Measurements of one way, the largest of all ranks; sizes in bytes, bytes_read in total.

    ready: seconds until the model with adapters is on the device, without imports. load_peak, held: of the GPU. host:
    peak of anonymous memory above that at the start. steps: by batch, seconds, peaks and losses, or the error.
    """

    way: str
    ranks: int
    memory_cap: float | None
    device: str = ""
    error: str | None = None
    ready: float = 0.0
    load_peak: int = 0
    held: int = 0
    host: int = 0
    bytes_read: int = 0
    trainable: int = 0
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure(options: Options, into: Path) -> None:
    """Load and train on all ranks; rank 0 writes `Found` to the file `into` after each stage."""
    _import_upstream()
    with joined(options.device, memory_cap=options.memory_cap) as world:
        found = Found(way=options.way, ranks=options.ranks, memory_cap=options.memory_cap, device=_name(world))
        write = partial(_write, found, into if world.rank == 0 else None)
        try:
            model = _load(options, world, found)
        except Exception as error:  # any error is a result
            found.error = describe(error)
            write()
            raise
        write()
        for text in options.batches:
            found.steps[text] = _train(model, Batch.of(text), options, world)
            write()


def _import_upstream() -> None:
    """Import what every way needs before time is taken."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.glm4_moe.modeling_glm4_moe
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401


def _name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.on_cuda else "CPU"


def _write(found: Found, into: Path | None) -> None:
    if into is not None:
        into.write_text(json.dumps(asdict(found)), encoding="utf-8")


def _load(options: Options, world: World, found: Found) -> nn.Module:
    torch.manual_seed(SEED)
    world.clear()
    report = Report(device=world.device)
    case = Case(
        checkpoint=Path(options.checkpoint),
        device=world.device,
        ranks=options.ranks,
        lora_rank=options.lora_rank,
        double_quant=options.double_quant,
        report=report,
    )
    world.meet()
    start = time.perf_counter()
    with report.phase(READY, group=READY):
        model = LOADERS[options.way](case)
        world.meet()
    found.ready = round(time.perf_counter() - start, 3)
    whole = report.phases[-1]
    found.load_peak = _largest(whole.device_peak)
    found.host = _largest(whole.host_peak - whole.host_before)
    found.held = _largest(torch.cuda.memory_allocated(world.device) if world.on_cuda else 0)
    found.bytes_read = sum(gather_objects(report.bytes_read))
    found.trainable = sum(parameter.numel() for parameter in _trainable(model))
    return model


def _largest(value: int) -> int:
    return max(gather_objects(value))


def _trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _train(model: Any, batch: Batch, options: Options, world: World) -> dict[str, Any]:
    """Take steps on one batch; on one rank an error is recorded, and the next batch has its turn."""
    try:
        return _steps(model, batch, options, world)
    except Exception as error:
        if options.ranks > 1:
            raise
        return {"error": describe(error)}
    finally:
        model.zero_grad(set_to_none=True)
        world.clear()


def _steps(model: Any, batch: Batch, options: Options, world: World) -> dict[str, Any]:
    if batch.checkpointing and not getattr(model, "_checkpointed", False):
        surgery.checkpoint_activations(model)
        model._checkpointed = True
    vocabulary = model.config.vocab_size
    ids = batch.draw(vocabulary, seed=SEED).to(world.device)
    optimizer = adamw(model, fused=True)
    clip = getattr(model, "clip_grad_norm_", partial(nn.utils.clip_grad_norm_, list(_trainable(model))))
    step = plain_step(model, optimizer, ids, clip=clip)
    losses, seconds = zip(*(_timed(step, world) for _ in range(options.steps)), strict=True)
    taken = median(seconds[2:] or seconds)
    peaks = _peaks(world)
    if options.profile is not None and str(batch) == options.batches[0]:
        text = profile(step, synchronize=world.synchronize, device=world.device)
        if world.rank == 0:
            Path(options.profile, f"{options.way}-{batch}.txt").write_text(text, encoding="utf-8")
    return {
        "losses": losses,
        "seconds": seconds,
        "step": taken,
        "tokens_per_second": round(options.ranks * batch.sequences * batch.tokens / taken),
        **peaks,
    }


def _peaks(world: World) -> dict[str, int]:
    if not world.on_cuda:
        return {"peak": 0, "reserved": 0}
    allocated, reserved = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    return {"peak": _largest(allocated(world.device)), "reserved": _largest(reserved(world.device))}


def _timed(step: Callable[[], float], world: World) -> tuple[float, float]:
    world.meet()
    start = time.perf_counter()
    loss = step()
    world.synchronize()
    return loss, round(time.perf_counter() - start, 4)
