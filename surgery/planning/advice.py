"""Advice on options that make a plan fit: each is tried alone, in order; if none is enough, they are combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from surgery.errors import ConfigError
from surgery.planning.plan import MemoryPlan, make_plan
from surgery.sharding.advice import Proposal, offloaded, on_ranks, shards_alone

__all__ = ["Advice", "advise", "advise_all"]

#: The most ranks that are tried.
MOST_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Options, as a user types them, and the highest device peak of any rank with all of them, in bytes."""

    options: tuple[str, ...]
    device_peak: int


#: What a user types for a change, and the plan with it.
Option = tuple[str, MemoryPlan]

Change = Callable[[MemoryPlan, int], Option | None]


def advise(plan: MemoryPlan, memory: int) -> Advice | None:
    """The first of `advise_all`, or None if nothing helps."""
    return next(iter(advise_all(plan, memory)), None)


def advise_all(plan: MemoryPlan, memory: int) -> Iterator[Advice]:
    """All single options that bring every rank of `plan` below `memory` bytes, or else the first combination."""
    alone = False
    for change in CHANGES:
        text, changed = _tried(change, plan, memory) or ("", plan)
        if text and changed.device_peak <= memory:
            alone = True
            yield Advice(options=(text,), device_peak=changed.device_peak)
    if not alone:
        yield from _combined(plan, memory)


def _combined(plan: MemoryPlan, memory: int) -> Iterator[Advice]:
    chosen: list[str] = []
    for change in CHANGES:
        text, changed = _tried(change, plan, memory) or ("", plan)
        if changed.device_peak >= plan.device_peak:
            continue
        plan = changed
        chosen.append(text)
        if plan.device_peak <= memory:
            yield Advice(options=tuple(chosen), device_peak=plan.device_peak)
            return


def _tried(change: Change, plan: MemoryPlan, memory: int) -> Option | None:
    """The plan after `change`; None where that does not apply, or would be refused (some adapters, sharded so)."""
    try:
        return change(plan, memory)
    except ConfigError:
        return None


def _shared(plan: MemoryPlan, proposal: Proposal | None, world_size: int | None = None) -> Option | None:
    """The plan with another sharding, on `world_size` ranks if that is given."""
    if proposal is None:
        return None
    setting = replace(
        plan.setting,
        shard=proposal.shard,
        placement=proposal.placement,
        world_size=world_size or plan.setting.world_size,
    )
    return proposal.text, make_plan(plan.inventory, setting, plan.training)


def _checkpointing(plan: MemoryPlan, _memory: int) -> Option | None:
    if plan.training is None or plan.training.checkpointing:
        return None
    training = replace(plan.training, checkpointing=True)
    return "--activation-checkpointing", make_plan(plan.inventory, plan.setting, training)


def _more_ranks(plan: MemoryPlan, memory: int) -> Option | None:
    """The smallest number of ranks that fits; if none does, the one with the lowest peak of those that were tried."""
    low, tried = plan.setting.world_size, []
    while low < MOST_RANKS:
        high = min(2 * low, MOST_RANKS)
        option = _on_ranks(plan, high)
        if option is None:
            return None
        if option[1].device_peak <= memory:
            return _fewest(plan, memory, low=low, enough=option)
        tried.append(option)
        low = high
    return min(tried, key=lambda each: each[1].device_peak, default=None)


def _fewest(plan: MemoryPlan, memory: int, *, low: int, enough: Option) -> Option:
    """The smallest number of ranks above `low` that fits, by bisection; `enough` fits."""
    while enough[1].setting.world_size - low > 1:
        middle = (low + enough[1].setting.world_size) // 2
        tried = _on_ranks(plan, middle)
        if tried is not None and tried[1].device_peak <= memory:
            enough = tried
        else:
            low = middle
    return enough


def _on_ranks(plan: MemoryPlan, world_size: int) -> Option | None:
    return _shared(plan, on_ranks(plan.setting.strategy, world_size), world_size)


def _halved(plan: MemoryPlan, memory: int, *, name: str, least: int) -> Option | None:
    """Halve the field `name` of the training until the plan fits, or the field would be below `least`."""
    option: Option | None = None
    training = plan.training
    while training is not None and getattr(training, name) // 2 >= least:
        training = replace(training, **{name: getattr(training, name) // 2})
        option = f"--{name} {getattr(training, name)}", make_plan(plan.inventory, plan.setting, training)
        if option[1].device_peak <= memory:
            break
    return option


CHANGES: tuple[Change, ...] = (
    _checkpointing,
    lambda plan, _memory: _shared(plan, shards_alone(plan.setting.strategy)),
    _more_ranks,
    lambda plan, _memory: _shared(plan, offloaded(plan.setting.strategy)),
    partial(_halved, name="batch", least=1),
    partial(_halved, name="seq", least=128),
)
