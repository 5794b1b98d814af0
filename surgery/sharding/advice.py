"""Proposals of other shardings for a memory plan, each with the options that a user types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from surgery.config import DDP, FSDP1, FSDP2
from surgery.sharding.base import ShardStrategy

__all__ = ["OFFLOADED", "Proposal", "default_options", "offloaded", "on_ranks", "options_of", "shards_alone"]

#: What a user types for shards that wait on the CPU, in one word of the shell.
OFFLOADED = """--fsdp-config '{"cpu_offload": true}'"""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Options of a strategy and a placement; `text` is what a user types for them."""

    text: str
    shard: Any
    placement: str


def default_options(world_size: int) -> FSDP2 | None:
    """Options of the strategy of so many ranks where a user chooses none."""
    return FSDP2() if world_size > 1 else None


def shards_alone(strategy: ShardStrategy) -> Proposal | None:
    """A sharding in which no rank ever holds more than its shard; None if that is so already, or for one rank."""
    if strategy.shards_on_meta or strategy.world_size == 1:
        return None
    shard = FSDP2(cpu_offload=strategy.cpu_offload)
    return Proposal(text="--fsdp 2 --placement sharded", shard=shard, placement="sharded")


def offloaded(strategy: ShardStrategy) -> Proposal | None:
    """The same sharding with shards on the CPU between uses; None if that is so already, or impossible."""
    cannot = getattr(strategy.options, "cpu_offload", None) is None or strategy.device.type == "cpu"
    if strategy.cpu_offload or cannot:
        return None
    shard = replace(strategy.options, cpu_offload=True)
    return Proposal(text=OFFLOADED, shard=shard, placement=strategy.placement)


def on_ranks(strategy: ShardStrategy, world_size: int) -> Proposal | None:
    """The same sharding on `world_size` ranks, FSDP2 if there is none; None if a mesh fixes the number of ranks."""
    if getattr(strategy.options, "mesh", None) is not None:
        return None
    text = f"--world {world_size}"
    if strategy.options is None:
        return Proposal(text=text, shard=FSDP2(), placement="sharded")
    return Proposal(text=text, shard=strategy.options, placement=strategy.placement)


def options_of(strategy: ShardStrategy) -> list[str]:
    """Options of `surgery finetune` for the sharding of `strategy`; defaults are left out."""
    options = strategy.options
    versions: dict[type[Any], str] = {FSDP1: "1", DDP: "none"}
    version, mesh = versions.get(type(options)), getattr(options, "mesh", None)
    return [
        *([f"--fsdp {version}"] if version else []),
        *([f"--mesh {mesh[0]}x{mesh[1]}"] if mesh else []),
        *([OFFLOADED] if strategy.cpu_offload else []),
    ]
