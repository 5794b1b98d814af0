"""How much a rank reads, and what is read once per node."""

from __future__ import annotations

from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["bytes_read", "read_once_per_node"]


def read_once_per_node(inventory: Inventory) -> tuple[str, ...]:
    """Checkpoint keys that upstream's conversion merges or splits, or that are held transposed, in order."""
    found = (key for target in inventory.targets if target.source is None for key in target.assignment.sources)
    return tuple(dict.fromkeys(found))


def bytes_read(inventory: Inventory, setting: Setting, rank: int) -> int:
    """What `rank` reads of tensors that map to one parameter each; a copy under a tied name is read to be compared."""
    division = setting.loading
    total = 0
    for target in inventory.targets:
        if target.source is not None:
            elements = len(division.slice(target.form, rank).elements)
            total += elements * target.source.dtype.itemsize * (1 + len(target.assignment.duplicates))
    return total
