"""Host memory that is no tensor's."""

from __future__ import annotations

from surgery.planning.allowances import ADAPTER_OBJECT_BYTES, GROUP_BYTES, HOST_BYTES, TARGET_OBJECT_BYTES
from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["fixed_bytes"]


def fixed_bytes(inventory: Inventory, setting: Setting) -> int:
    """Of threads, tables and Python's objects, while a model is loaded and after."""
    adapters = sum(len(unit.adapters) for unit in inventory.units)
    objects = len(inventory.targets) * TARGET_OBJECT_BYTES + adapters * ADAPTER_OBJECT_BYTES
    return HOST_BYTES + (GROUP_BYTES if setting.world_size > 1 else 0) + objects
