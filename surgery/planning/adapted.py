"""What adapters take while a model is built: one after the other on every host, of which this rank's shards stay."""

from __future__ import annotations

from surgery.passes.adapt import draws_later
from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["adapters_as_made", "adapters_being_drawn", "adapters_held", "adapters_whole"]

#: PEFT makes adapters in float32, on the CPU of every rank, and casts them then.
MADE_IN_BYTES = 4


def adapters_as_made(inventory: Inventory, setting: Setting) -> int:
    """Bytes of all adapters before they are cast, where PEFT makes all of them before any is sharded; else 0."""
    if setting.lora is None or draws_later(setting.lora):
        return 0
    return inventory.adapter_elements * MADE_IN_BYTES


def adapters_being_drawn(inventory: Inventory, setting: Setting) -> int:
    """Bytes on the host beside what is held, where each is drawn apart: two matrices, and what is on its way to a GPU,
    together and one by one; else 0.
    """
    if setting.lora is None or not draws_later(setting.lora):
        return 0
    largest = max((rows * row for unit in inventory.units for rows, row in unit.adapters), default=0)
    leaves = setting.placement == "sharded" and not setting.on_cpu and not setting.cpu_offload
    return 2 * largest * MADE_IN_BYTES + (2 * adapters_held(inventory, setting) if leaves else 0)


def adapters_whole(inventory: Inventory, setting: Setting) -> int:
    """Bytes of all adapters."""
    return inventory.adapter_elements * setting.dtype.itemsize


def adapters_held(inventory: Inventory, setting: Setting) -> int:
    """What a rank keeps of them, padded to what the rank with most has."""
    elements = sum(unit.adapter_elements(setting.sharding.shards) for unit in inventory.units)
    return elements * setting.dtype.itemsize
