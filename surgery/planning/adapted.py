"""What adapters take while a model is built: whole on every host first, then this rank's shard."""

from __future__ import annotations

from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["adapters_as_made", "adapters_held", "adapters_whole"]

#: PEFT makes adapters in float32, on the CPU of every rank; they are cast when all are made.
MADE_IN_BYTES = 4


def adapters_as_made(inventory: Inventory) -> int:
    """Bytes of all adapters before they are cast."""
    return inventory.adapter_elements * MADE_IN_BYTES


def adapters_whole(inventory: Inventory, setting: Setting) -> int:
    """Bytes of all adapters."""
    return inventory.adapter_elements * setting.dtype.itemsize


def adapters_held(inventory: Inventory, setting: Setting) -> int:
    """What a rank keeps of them, padded to what the rank with most has."""
    elements = sum(unit.adapter_elements(setting.sharding.shards) for unit in inventory.units)
    return elements * setting.dtype.itemsize
