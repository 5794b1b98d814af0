"""Which option would make a plan fit: each one tried alone, in order; if none is enough, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from surgery.config import FSDP2
from surgery.errors import ConfigError
from surgery.planning.plan import MemoryPlan, make_plan
from surgery.planning.setting import Setting, Training

__all__ = ["Advice", "advise", "advise_all"]

#: The most ranks that are tried.
MOST_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class Advice:
    """options: as one would type them. device_peak: of the rank with most, with all of them."""

    options: tuple[str, ...]
    device_peak: int


@dataclass(frozen=True, kw_only=True)
class _Option:
    """One change. text: what to type for it."""

    text: str
    plan: MemoryPlan


Change = Callable[[MemoryPlan, int], "_Option | None"]


def advise(plan: MemoryPlan, memory: int) -> Advice | None:
    """The first of `advise_all`, or None if nothing helps."""
    return next(iter(advise_all(plan, memory)), None)


def advise_all(plan: MemoryPlan, memory: int) -> Iterator[Advice]:
    """What would bring every rank of `plan` below `memory` bytes: all single options, or else the first combination."""
    alone = False
    for change in CHANGES:
        option = _tried(change, plan, memory)
        if option is not None and option.plan.device_peak <= memory:
            alone = True
            yield Advice(options=(option.text,), device_peak=option.plan.device_peak)
    if not alone:
        yield from _combined(plan, memory)


def _combined(plan: MemoryPlan, memory: int) -> Iterator[Advice]:
    chosen: list[str] = []
    for change in CHANGES:
        option = _tried(change, plan, memory)
        if option is None or option.plan.device_peak >= plan.device_peak:
            continue
        plan = option.plan
        chosen.append(option.text)
        if plan.device_peak <= memory:
            yield Advice(options=tuple(chosen), device_peak=plan.device_peak)
            return


def _tried(change: Change, plan: MemoryPlan, memory: int) -> _Option | None:
    """What `change` makes of `plan`; None where it does not apply, or would be refused (some adapters, sharded so)."""
    try:
        return change(plan, memory)
    except ConfigError:
        return None


def _changed(plan: MemoryPlan, *, setting: Setting | None = None, training: Training | None = None) -> MemoryPlan:
    return make_plan(plan.inventory, setting or plan.setting, training or plan.training)


def _checkpointing(plan: MemoryPlan, _memory: int) -> _Option | None:
    if plan.training is None or plan.training.checkpointing:
        return None
    changed = _changed(plan, training=replace(plan.training, checkpointing=True))
    return _Option(text="--activation-checkpointing", plan=changed)


def _sharded(plan: MemoryPlan, _memory: int) -> _Option | None:
    if plan.setting.placement == "sharded" or plan.setting.world_size == 1:
        return None
    offload = plan.setting.cpu_offload
    setting = replace(plan.setting, placement="sharded", shard=FSDP2(cpu_offload=offload))
    return _Option(text="--fsdp 2 --placement sharded", plan=_changed(plan, setting=setting))


def _more_ranks(plan: MemoryPlan, memory: int) -> _Option | None:
    """The smallest number of ranks that is enough; if none is, of those that were tried the one that needs least."""
    if plan.setting.mesh is not None or plan.setting.world_size >= MOST_RANKS:
        return None
    low, tried = plan.setting.world_size, []
    while low < MOST_RANKS:
        high = min(2 * low, MOST_RANKS)
        tried.append(_on_ranks(plan, high))
        if tried[-1].device_peak <= memory:
            return _ranks_option(_fewest(plan, memory, low=low, enough=tried[-1]))
        low = high
    return _ranks_option(min(tried, key=lambda each: each.device_peak))


def _fewest(plan: MemoryPlan, memory: int, *, low: int, enough: MemoryPlan) -> MemoryPlan:
    """The plan for the smallest number of ranks above `low` that fits, by bisection; `enough` fits."""
    while enough.setting.world_size - low > 1:
        middle = (low + enough.setting.world_size) // 2
        tried = _on_ranks(plan, middle)
        if tried.device_peak <= memory:
            enough = tried
        else:
            low = middle
    return enough


def _ranks_option(plan: MemoryPlan) -> _Option:
    return _Option(text=f"--world {plan.setting.world_size}", plan=plan)


def _on_ranks(plan: MemoryPlan, world_size: int) -> MemoryPlan:
    shard, placement = plan.setting.shard, plan.setting.placement
    if shard is None:
        shard, placement = FSDP2(), "sharded"
    return _changed(plan, setting=replace(plan.setting, world_size=world_size, shard=shard, placement=placement))


def _cpu_offload(plan: MemoryPlan, _memory: int) -> _Option | None:
    shard = plan.setting.shard
    if shard is None or shard.cpu_offload or plan.setting.on_cpu:
        return None
    setting = replace(plan.setting, shard=replace(shard, cpu_offload=True))
    return _Option(text="--cpu-offload", plan=_changed(plan, setting=setting))


def _smaller_batch(plan: MemoryPlan, memory: int) -> _Option | None:
    """Half the batch, and half of that, until it fits or is one sample."""
    return _halved(plan, memory, "batch", least=1)


def _shorter(plan: MemoryPlan, memory: int) -> _Option | None:
    """Half the sequence, and half of that, until it fits or is short."""
    return _halved(plan, memory, "seq", least=128)


def _halved(plan: MemoryPlan, memory: int, name: str, *, least: int) -> _Option | None:
    option: _Option | None = None
    training = plan.training
    while training is not None and getattr(training, name) // 2 >= least:
        training = replace(training, **{name: getattr(training, name) // 2})
        option = _Option(text=f"--{name} {getattr(training, name)}", plan=_changed(plan, training=training))
        if option.plan.device_peak <= memory:
            break
    return option


CHANGES: tuple[Change, ...] = (_checkpointing, _sharded, _more_ranks, _cpu_offload, _smaller_batch, _shorter)
