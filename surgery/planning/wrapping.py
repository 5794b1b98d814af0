"""What FSDP needs while it takes the loaded model: nothing under `sharded`; whole units, one at a time, under FSDP1."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.config import FSDP1
from surgery.planning.inventory import Inventory
from surgery.planning.peaks import Peaks
from surgery.planning.setting import Setting

__all__ = ["fsdp1_units", "held_when_sharded", "wrap"]


def held_when_sharded(inventory: Inventory, setting: Setting) -> int:
    """Bytes of the frozen weights that a rank keeps, padded to what the rank with most has."""
    return inventory.unsharded + sum(unit.weight_bytes(setting.sharding.shards) for unit in inventory.units)


def fsdp1_units(inventory: Inventory) -> Sequence[int]:
    """Bytes of the frozen weights of each unit, in the order in which they are wrapped: every block, then the root."""
    in_blocks = [unit.weight_bytes() for unit in inventory.blocks]
    return [*in_blocks, sum(unit.weight_bytes() for unit in inventory.units) - sum(in_blocks)]


def wrap(inventory: Inventory, setting: Setting, peaks: Peaks, *, rank: int, host: int, device: int) -> None:
    """Note the moments of sharding, beside `host` and `device` bytes of other things."""
    if setting.shard is None or setting.placement == "sharded":
        return
    units = fsdp1_units(inventory)
    if not isinstance(setting.shard, FSDP1):  # one parameter after another, each freed when it is sharded
        peaks.note(host=host, device=device + sum(units))
        return
    wraps_from_host = setting.placement == "rank0-cpu"
    has_weights = rank == 0 or not wraps_from_host
    left, held = sum(units) if has_weights else 0, inventory.unsharded
    for unit in units:
        shard = -(-unit // setting.sharding.shards)
        # Memory for the unit's parameters, where there is none yet; a flat copy of them; and this rank's shard of that.
        is_here = has_weights and (setting.on_cpu or not wraps_from_host)
        work = held + (1 if is_here else 2) * unit + shard
        peaks.note(
            host=host + (left if wraps_from_host else 0),
            device=device + work + (0 if wraps_from_host else left),
        )
        held += shard
        left -= unit if has_weights else 0
