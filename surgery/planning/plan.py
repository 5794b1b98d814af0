"""A memory plan: bytes that every rank of a job reads, holds and peaks at, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.adapters.saved import SavedAdapter
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.peek import peek
from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.passes.base import group_into_batches
from surgery.passes.loading import Staging
from surgery.passes.prepare import prepare
from surgery.passes.setting import Setting
from surgery.planning.inventory import Inventory, take_inventory
from surgery.planning.loading import plan_load
from surgery.planning.ranks import RankClass, RankPlan, bytes_read, classify, read_once_per_node
from surgery.planning.training import Training, plan_step
from surgery.sharding.advice import default_options

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Experts", "MemoryPlan", "make_plan", "plan"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Fused experts in 4 bits, and what the same job would need with them in 16 bits.

    packed, statistics, in_16_bits: bytes of all experts, over all shards. held: the most that a rank holds after
    loading, where it computes. peak: the highest of any rank there.
    """

    packed: int
    statistics: int
    in_16_bits: int
    held: int
    held_in_16_bits: int
    peak: int
    peak_in_16_bits: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Figures for every rank of a job, in bytes above what a process holds before it begins to load.

    classes: ranks that are alike, with the figures of one of them. read_once_per_node: checkpoint keys that upstream's
    conversion splits or permutes: one rank of each node reads them for the others, beside its `bytes_read`.
    training: None if only loading was planned.
    """

    setting: Setting
    training: Training | None
    classes: tuple[tuple[RankClass, RankPlan], ...]
    read_once_per_node: tuple[str, ...] = ()
    inventory: Inventory = field(repr=False)

    def of_rank(self, rank: int) -> RankPlan:
        """The figures of `rank`; what it reads is to within a block a tensor. Raises `IndexError` for no rank."""
        for ranks, figures in self.classes:
            if rank in ranks.ranks:
                return figures
        raise IndexError(f"expected a rank below {self.setting.world_size}, found {rank}")

    @property
    def device_peak(self) -> int:
        """Highest device peak of any rank."""
        return max(figures.device_peak for _, figures in self.classes)

    @property
    def host_peak(self) -> int:
        """Highest host peak of any rank."""
        return max(figures.host_peak for _, figures in self.classes)

    @property
    def held(self) -> int:
        """The most that any rank holds after loading, where it computes."""
        on_cpu = self.setting.on_cpu
        return max(plan.load.host_held if on_cpu else plan.load.device_held for _, plan in self.classes)

    @property
    def peak(self) -> int:
        """The highest peak of any rank, where it computes."""
        return self.host_peak if self.setting.on_cpu else self.device_peak

    @cached_property
    def in_16_bits(self) -> MemoryPlan | None:
        """The plan of the same job with experts in 16 bits; None if none are packed."""
        inventory, quant = self.inventory.in_16_bits, self.setting.quant
        if inventory is None:
            return None
        return make_plan(inventory, replace(self.setting, quant=replace(quant, experts=False)), self.training)

    @cached_property
    def experts(self) -> Experts | None:
        """The experts that are packed; None if none are."""
        if self.in_16_bits is None:
            return None
        packed = self.inventory.experts
        names = {target.fqn for target in packed}
        return Experts(
            packed=sum(target.nbytes for target in packed),
            statistics=sum(target.nbytes for target in self.inventory.targets if target.statistics_of in names),
            in_16_bits=sum(target.form.numel for target in packed) * self.setting.dtype.itemsize,
            held=self.held,
            held_in_16_bits=self.in_16_bits.held,
            peak=self.peak,
            peak_in_16_bits=self.in_16_bits.peak,
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON, sizes in bytes."""
        return {
            "world_size": self.setting.world_size,
            "placement": self.setting.strategy.placement,
            "sharding": None if self.setting.shard is None else type(self.setting.shard).__name__,
            "device": self.setting.device.type,
            "parameters": self.inventory.parameters,
            "training": None if self.training is None else asdict(self.training),
            "read_once_per_node": list(self.read_once_per_node),
            "ignored": list(self.inventory.ignored),
            "initialized": list(self.inventory.initialized),
            "left_out": list(self.inventory.left_out),
            "experts": None if self.experts is None else asdict(self.experts),
            "ranks": [
                {"label": ranks.label, "count": len(ranks.ranks), **asdict(plan)} for ranks, plan in self.classes
            ],
        }


def make_plan(inventory: Inventory, setting: Setting, training: Training | None) -> MemoryPlan:
    """The plan for a model of which `inventory` was taken. Pure arithmetic."""
    staging = Staging.on(setting.device)
    batches = group_into_batches(inventory.targets, elements=staging.layer_limit(setting.world_size))
    classes = []
    for ranks in classify(inventory, setting):
        figures = RankPlan(
            bytes_read=bytes_read(inventory, setting, ranks.typical),
            load=plan_load(inventory, setting, staging, batches, rank=ranks.typical),
            train=plan_step(inventory, setting, training, rank=ranks.typical) if training is not None else None,
        )
        classes.append((ranks, figures))
    return MemoryPlan(
        setting=setting,
        training=training,
        classes=tuple(classes),
        read_once_per_node=read_once_per_node(inventory),
        inventory=inventory,
    )


def plan(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    world_size: int,
    quant: Any = Quant(),  # noqa: B008  # frozen
    lora: LoraConfig | None = None,
    adapter: str | os.PathLike[str] | None = None,
    placement: str | None = None,
    shard: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    model: Callable[[], nn.Module] | None = None,
    device: str = "cuda",
    training: Training | None = Training(),  # noqa: B008  # frozen
) -> MemoryPlan:
    """Plan the memory of every rank, if `surgery.qlora` were called like this on `world_size` ranks.

    Needs no process group and no GPU, and reads no weight: of a hub id it fetches the headers of the files, and
    downloads none of them.

    Args:
        checkpoint: an open checkpoint, a folder, a safetensors file, or a hub id.
        world_size: number of ranks.
        quant: as in `surgery.qlora`, like `lora`, `placement`, `dtype`, `compute_dtype` and `model`.
        lora: the adapters; None plans without any.
        adapter: a saved adapter in place of `lora`, as in `surgery.qlora`.
        placement: None means the default of `shard`.
        shard: None means FSDP2 on several ranks.
        dtype: of everything unquantized.
        compute_dtype: None means `dtype`.
        model: builds the module; None builds what the checkpoint's config.json describes.
        device: the kind that the ranks compute on, `cuda` or `cpu`.
        training: None plans loading alone.

    Raises:
        ConfigError: options that cannot work together.
        CheckpointError: a checkpoint that is broken, or not of this model.
    """
    saved = None if adapter is None else SavedAdapter.open(adapter)
    if saved is not None and lora is not None:
        raise ConfigError("expected lora= or adapter=, found both: the configuration of the adapter decides")
    setting = Setting(
        world_size=world_size,
        placement=placement,
        shard=default_options(world_size) if shard is None else shard,
        quant=quant,
        lora=lora if saved is None else saved.config,
        adapter=saved,
        dtype=dtype,
        compute_dtype=compute_dtype or dtype,
        device=torch.device(device),
    )
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else peek(checkpoint)
    prepared = prepare(opened, setting, build=model)
    return make_plan(take_inventory(prepared), prepared.setting, training)
