"""The options that would make a plan fit: each one tried alone, in order; if none is enough, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from surgery.errors import ConfigError
from surgery.planning.plan import MemoryPlan, make_plan
from surgery.planning.training import Training
from surgery.sharding.advice import Proposal, offloaded, on_ranks, shards_alone

__all__ = ["Advice", "advise", "advise_all"]

#: The most ranks that are tried.
MOST_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class Advice:
    """options: as a user types them. device_peak: the highest of any rank, with all of them."""

    options: tuple[str, ...]
    device_peak: int


@dataclass(frozen=True, kw_only=True)
class _Option:
    """A change, and the plan with it. text: what a user types for it."""

    text: str
    plan: MemoryPlan


Change = Callable[[MemoryPlan, int], "_Option | None"]


def advise(plan: MemoryPlan, memory: int) -> Advice | None:
    """The first of `advise_all`, or None if nothing helps."""
    return next(iter(advise_all(plan, memory)), None)


def advise_all(plan: MemoryPlan, memory: int) -> Iterator[Advice]:
    """All single options that bring every rank of `plan` below `memory` bytes, or else the first combination."""
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
    """The plan after `change`; None where that does not apply, or would be refused (some adapters, sharded so)."""
    try:
        return change(plan, memory)
    except ConfigError:
        return None


def _retrained(plan: MemoryPlan, training: Training, text: str) -> _Option:
    return _Option(text=text, plan=make_plan(plan.inventory, plan.setting, training))


def _shared(plan: MemoryPlan, proposal: Proposal | None, world_size: int | None = None) -> _Option | None:
    """The plan with another sharding, and on other ranks where `world_size` says so."""
    if proposal is None:
        return None
    setting = replace(
        plan.setting,
        shard=proposal.shard,
        placement=proposal.placement,
        world_size=world_size or plan.setting.world_size,
    )
    return _Option(text=proposal.text, plan=make_plan(plan.inventory, setting, plan.training))


def _checkpointing(plan: MemoryPlan, _memory: int) -> _Option | None:
    if plan.training is None or plan.training.checkpointing:
        return None
    return _retrained(plan, replace(plan.training, checkpointing=True), "--activation-checkpointing")


def _sharded(plan: MemoryPlan, _memory: int) -> _Option | None:
    return _shared(plan, shards_alone(plan.setting.strategy))


def _cpu_offload(plan: MemoryPlan, _memory: int) -> _Option | None:
    return _shared(plan, offloaded(plan.setting.strategy))


def _more_ranks(plan: MemoryPlan, memory: int) -> _Option | None:
    """The smallest number of ranks that is enough; if none is, of those that were tried the one that needs least."""
    low, tried = plan.setting.world_size, []
    while low < MOST_RANKS:
        high = min(2 * low, MOST_RANKS)
        option = _on_ranks(plan, high)
        if option is None:
            return None
        if option.plan.device_peak <= memory:
            return _fewest(plan, memory, low=low, enough=option)
        tried.append(option)
        low = high
    return min(tried, key=lambda each: each.plan.device_peak, default=None)


def _fewest(plan: MemoryPlan, memory: int, *, low: int, enough: _Option) -> _Option:
    """The smallest number of ranks above `low` that fits, by bisection; `enough` fits."""
    while enough.plan.setting.world_size - low > 1:
        middle = (low + enough.plan.setting.world_size) // 2
        tried = _on_ranks(plan, middle)
        if tried is not None and tried.plan.device_peak <= memory:
            enough = tried
        else:
            low = middle
    return enough


def _on_ranks(plan: MemoryPlan, world_size: int) -> _Option | None:
    return _shared(plan, on_ranks(plan.setting.strategy, world_size), world_size)


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
        option = _retrained(plan, training, f"--{name} {getattr(training, name)}")
        if option.plan.device_peak <= memory:
            break
    return option


CHANGES: tuple[Change, ...] = (_checkpointing, _sharded, _more_ranks, _cpu_offload, _smaller_batch, _shorter)
