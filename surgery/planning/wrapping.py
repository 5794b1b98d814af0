"""What FSDP needs while it takes the loaded model: nothing under `sharded`; whole units, one at a time, under FSDP1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.config import FSDP1
from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting

__all__ = ["Wrapped", "wrap"]

#: FSDP1 broadcasts the tensors of a unit in flat buffers of at most so many bytes.
BROADCAST_BYTES = 250 << 20


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """held: shards, on the device. host_peak: beside what the device holds."""

    held: int
    host_peak: int
    device_peak: int


def wrap(inventory: Inventory, setting: Setting, *, rank: int, loaded: int) -> Wrapped:
    """From `loaded` bytes of parts to what the sharded model holds of them."""
    shards = setting.sharding.shards
    if setting.shard is None or setting.placement == "sharded":
        return Wrapped(held=loaded, host_peak=0, device_peak=loaded)
    if not isinstance(setting.shard, FSDP1):  # parameter by parameter, each freed when it is sharded
        held = sum(unit.weight_bytes(shards) for unit in inventory.units)
        return Wrapped(held=held, host_peak=0, device_peak=loaded)
    units = fsdp1_units(inventory)
    waits_on_host = setting.placement == "rank0-cpu"
    host = device = held = 0
    left = sum(units) if rank == 0 or not waits_on_host else 0
    for unit in units:
        shard = -(-unit // shards)
        is_here = not waits_on_host or (setting.on_cpu and rank == 0)
        arrives = 0 if is_here else unit  # meta parameters get memory, or come from the CPU of this rank
        waiting = left if not waits_on_host else 0
        host = max(host, left if waits_on_host else 0)
        device = max(device, held + waiting + arrives + max(min(unit, BROADCAST_BYTES), unit + shard))
        held += shard
        left = max(left - unit, 0)
    return Wrapped(held=held, host_peak=host, device_peak=device)


def fsdp1_units(inventory: Inventory) -> Sequence[int]:
    """Bytes of the frozen weights of each unit, in the order in which they are wrapped: every block, then the root."""
    in_blocks = [unit.weight_bytes() for unit in inventory.blocks]
    return [*in_blocks, sum(unit.weight_bytes() for unit in inventory.units) - sum(in_blocks)]
