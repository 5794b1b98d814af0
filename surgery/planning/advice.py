"""Advice on options that make a plan fit: each is tried alone, in order; if none is enough, they are combined."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.passes.setting import Setting
from surgery.planning.plan import MemoryPlan, make_plan
from surgery.planning.training import Training
from surgery.sharding.advice import Proposal, offloaded, on_ranks, options_of, shards_alone
from surgery.step.kernels import KERNELS, missing_package

__all__ = ["Advice", "advise", "advise_all", "command"]

#: The most ranks that are tried.
MOST_RANKS = 1024

#: Where no number of ranks fits, more of them are not advised for a peak that is lower by less than this factor.
WORTH = 1.1

#: TRL's rank of adapters where none is given.
USUAL_RANK = 16

#: Fields of the training -> their names in TRL's configuration.
OPTIONS = {"batch": "--per-device-train-batch-size", "seq": "--max-length"}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Options, as a user types them, and the plan with all of them."""

    options: tuple[str, ...]
    plan: MemoryPlan = field(repr=False)

    @property
    def device_peak(self) -> int:
        """The highest device peak of any rank, in bytes."""
        return self.plan.device_peak

    @property
    def install(self) -> str | None:
        """The command that installs what the options need and is not here; None if all is."""
        return None if self.plan.training is None else missing_package(self.plan.training.kernels)


def command(plan: MemoryPlan, model: str) -> str:
    """The command line that fine-tunes `model` as planned, once DATA is filled in; what is a default is left out."""
    setting, ranks = plan.setting, plan.setting.world_size
    launched = f"torchrun --nproc-per-node {ranks} -m surgery" if ranks > 1 else "surgery"
    options = [*_trained(plan.training), *_adapters(setting), *_stored(setting), *options_of(setting.strategy)]
    return " ".join([f"{launched} finetune {shlex.quote(model)} --data DATA", *options])


def _trained(training: Training | None) -> Iterator[str]:
    usual = Training()
    if training is None:
        return
    for name, option in OPTIONS.items():
        if getattr(training, name) != getattr(usual, name):
            yield f"{option} {getattr(training, name)}"
    if training.optimizer != usual.optimizer:
        yield f"--optim {training.optimizer}"
    switches = {
        "--no-gradient-checkpointing": not training.checkpointing,
        "--activation-offloading": training.offload,
        f"--kernels {','.join(training.kernels)}": training.kernels,
        "--cuda-graphs": training.graphs,
    }
    yield from (option for option, is_on in switches.items() if is_on)


def _adapters(setting: Setting) -> Iterator[str]:
    lora = setting.lora
    if setting.adapter is not None:
        yield f"--adapter {shlex.quote(setting.adapter.source)}"
        return
    if lora is None:
        return
    if lora.r != USUAL_RANK:
        yield f"--lora-r {lora.r}"
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else sorted(lora.target_modules or ())
    if targets != ["all-linear"]:
        yield f"--lora-target-modules {shlex.join(targets)}"
    if lora.target_parameters:
        yield f"--lora-target-parameters {shlex.join(lora.target_parameters)}"


def _stored(setting: Setting) -> Iterator[str]:
    quant, dtype = setting.quant, _name(setting.dtype)
    if dtype != "bfloat16":
        yield f"--dtype {dtype}"
    if not isinstance(quant, Quant):
        return
    if quant.quant_type != Quant().quant_type:
        yield f"--bnb-4bit-quant-type {quant.quant_type}"
    if quant.experts is False:
        yield "--experts 16bit"
    if not quant.double_quant:
        yield "--use-bnb-nested-quant false"
    if quant.storage_for(setting.dtype) != setting.dtype:
        yield f"--bnb-4bit-quant-storage {_name(quant.storage_for(setting.dtype))}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
            yield Advice(options=(text,), plan=changed)
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
            yield Advice(options=tuple(chosen), plan=plan)
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


def _kernels(plan: MemoryPlan, memory: int) -> Option | None:
    """All kernels that the job can have; without those that are not installed here, if that is enough."""
    training = plan.training
    if training is None or plan.setting.on_cpu:
        return None
    is_fusable = isinstance(plan.setting.quant, Quant) and plan.setting.lora is not None
    every = tuple(name for name in KERNELS if name != "fused" or is_fusable or name in training.kernels)
    installed = tuple(name for name in every if name in training.kernels or missing_package((name,)) is None)
    for names in (installed, every):
        changed = make_plan(plan.inventory, plan.setting, replace(training, kernels=names))
        if changed.device_peak <= memory:
            break
    return None if set(names) == {*training.kernels} else (f"--kernels {','.join(names)}", changed)


def _without_graphs(plan: MemoryPlan, _memory: int) -> Option | None:
    if plan.training is None or not plan.training.graphs:
        return None
    return "no --cuda-graphs", make_plan(plan.inventory, plan.setting, replace(plan.training, graphs=0))


def _checkpointing(plan: MemoryPlan, _memory: int) -> Option | None:
    if plan.training is None or plan.training.checkpointing:
        return None
    training = replace(plan.training, checkpointing=True)
    return "--gradient-checkpointing", make_plan(plan.inventory, plan.setting, training)


def _offloading(plan: MemoryPlan, _memory: int) -> Option | None:
    if plan.training is None or plan.training.offload or not plan.training.checkpointing or plan.setting.on_cpu:
        return None
    training = replace(plan.training, offload=True)
    return "--activation-offloading", make_plan(plan.inventory, plan.setting, training)


def _more_ranks(plan: MemoryPlan, memory: int) -> Option | None:
    """The smallest number of ranks that fits; if none does, the smallest that was tried with about the lowest peak."""
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
    lowest = min((each.device_peak for _, each in tried), default=0)
    return next((option for option in tried if option[1].device_peak <= WORTH * lowest), None)


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


def _offloaded_shards(plan: MemoryPlan, _memory: int) -> Option | None:
    """Shards on the CPU; not where steps are recorded, since they could not be then."""
    is_recorded = plan.training is not None and plan.training.graphs
    return None if is_recorded else _shared(plan, offloaded(plan.setting.strategy))


def _halved(plan: MemoryPlan, memory: int, *, name: str, least: int) -> Option | None:
    """Halve the field `name` of the training until the plan fits, or the field would be below `least`."""
    option: Option | None = None
    training = plan.training
    while training is not None and getattr(training, name) // 2 >= least:
        training = replace(training, **{name: getattr(training, name) // 2})
        option = f"{OPTIONS[name]} {getattr(training, name)}", make_plan(plan.inventory, plan.setting, training)
        if option[1].device_peak <= memory:
            break
    return option


#: In the order of what they cost: kernels take less time, and others more of it, or more GPUs, or another job.
CHANGES: tuple[Change, ...] = (
    _kernels,
    _without_graphs,
    _checkpointing,
    _offloading,
    lambda plan, _memory: _shared(plan, shards_alone(plan.setting.strategy)),
    _more_ranks,
    _offloaded_shards,
    partial(_halved, name="batch", least=1),
    partial(_halved, name="seq", least=128),
)
