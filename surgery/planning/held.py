"""Memory that a rank holds in every phase: Python's objects, quantization states, shards of weights and adapters."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.adapters.attach import draws_later
from surgery.passes.setting import Setting
from surgery.passes.tensors import Target
from surgery.planning.inventory import Inventory

__all__ = [
    "adapters_as_made",
    "adapters_being_drawn",
    "adapters_held",
    "adapters_whole",
    "fixed_bytes",
    "state_bytes",
    "weights_held",
]

MIB = 1 << 20

#: Host memory that loading takes whatever the model: threads and their stacks, code and tables made on first use.
#: What a checkpoint of 251 MB took beside its tensors, upstream's modules imported before, with a C library that gives
#: freed memory back at once (`MALLOC_MMAP_THRESHOLD_=262144`): glibc as it comes keeps up to 20 MiB more.
HOST_BYTES = 5 * MIB

#: The same of a process group and of FSDP, where there are several ranks: on 2, 3 and 4 ranks of gloo.
GROUP_BYTES = 4 * MIB

#: Python objects for each tensor of the checkpoint (module, target, buffer), and for each of an adapter (PEFT's,
#: FSDP's): of models on meta with 2 and with 126 layers.
TARGET_OBJECT_BYTES = 7 << 10
ADAPTER_OBJECT_BYTES = 57 << 10

#: Bytes of an element of adapters as PEFT makes them: float32, on the CPU of every rank. It casts them then.
MADE_IN_BYTES = 4


def fixed_bytes(inventory: Inventory, setting: Setting) -> int:
    """Host memory of threads, tables and Python's objects, while a model is loaded and after."""
    adapters = sum(len(unit.adapters) for unit in inventory.units)
    objects = len(inventory.targets) * TARGET_OBJECT_BYTES + adapters * ADAPTER_OBJECT_BYTES
    return HOST_BYTES + (GROUP_BYTES if setting.world_size > 1 else 0) + objects


def state_bytes(targets: Iterable[Target], setting: Setting) -> int:
    """Bytes of the quantization states of `targets`, whole, as every rank has them."""
    return sum(setting.format.state_bytes(target.form.blocks) for target in targets if target.is_quantized)


def weights_held(inventory: Inventory, setting: Setting) -> int:
    """Bytes of frozen weights that a rank keeps of the complete model, padded to what the rank with most has."""
    shards = setting.strategy.at_rest.shards
    return inventory.unsharded + sum(unit.weight_bytes(shards) for unit in inventory.units)


def adapters_held(inventory: Inventory, setting: Setting) -> int:
    """Bytes of adapters that a rank keeps, padded to what the rank with most has."""
    shards = setting.strategy.at_rest.shards
    return sum(unit.adapter_elements(shards) for unit in inventory.units) * setting.dtype.itemsize


def adapters_whole(inventory: Inventory, setting: Setting) -> int:
    """Bytes of all adapters."""
    return inventory.adapter_elements * setting.dtype.itemsize


def adapters_as_made(inventory: Inventory, setting: Setting) -> int:
    """Bytes of all adapters before they are cast, where PEFT makes all of them before any is sharded; else 0."""
    if setting.lora is None or draws_later(setting.lora):
        return 0
    return inventory.adapter_elements * MADE_IN_BYTES


def adapters_being_drawn(inventory: Inventory, setting: Setting, *, rank: int) -> int:
    """Bytes on the host beside what is held, where adapters are drawn one after the other; else 0.

    That is two matrices, and what is on its way to a GPU, together and one by one.
    """
    if setting.lora is None or not draws_later(setting.lora):
        return 0
    largest = max((rows * row for unit in inventory.units for rows, row in unit.adapters), default=0)
    leaves = setting.strategy.adapter_device(rank).type != "cpu"
    return 2 * largest * MADE_IN_BYTES + (2 * adapters_held(inventory, setting) if leaves else 0)
