"""What adapters take while a model is built: whole on every host first, then this rank's shard."""

from __future__ import annotations

from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["adapter_host_peak", "adapter_shards", "shard_position"]

#: PEFT makes adapters in float32, on the CPU of every rank; they are cast when all are made.
MADE_IN_BYTES = 4


def adapter_host_peak(inventory: Inventory, setting: Setting) -> int:
    """When all are made, and one of them has been cast."""
    if setting.lora is None:
        return 0
    largest = max((rows * row for unit in inventory.units for rows, row in unit.adapters), default=0)
    return inventory.adapter_elements * MADE_IN_BYTES + largest * setting.dtype.itemsize


def shard_position(setting: Setting, rank: int) -> int:
    """Which part of a sharded tensor `rank` has."""
    return rank % setting.sharding.shards


def adapter_shards(inventory: Inventory, setting: Setting, rank: int) -> int:  # noqa: ARG001  # padded alike on all
    """What a rank keeps of them, padded to what the rank with most has."""
    elements = sum(unit.adapter_elements(setting.sharding.shards) for unit in inventory.units)
    return elements * setting.dtype.itemsize
