"""Combinations of options that cannot work, refused before anything is loaded.

What an upstream library does wrong is patched; what a user asks of it that it cannot do is refused here, with the name
of the library and what to choose instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from surgery.config import FSDP1, FSDP2, Placement, Quant
from surgery.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig


__all__ = [
    "check_kept",
    "check_precision",
    "check_sharding",
    "check_ties",
    "check_units",
    "check_world",
]

#: The first torch whose FSDP2 shards parameters of an integer dtype.
FSDP2_SHARDS_INTEGERS = (2, 13)


#: Names that an error lists at most.
SHOWN = 4


def check_world(shard: FSDP1 | FSDP2 | None, placement: Placement, world_size: int) -> None:
    """The ranks that there are against what is asked of them."""
    if shard is None and placement == "rank0-cpu" and world_size > 1:
        raise ConfigError(
            f"placement rank0-cpu leaves {world_size - 1} of {world_size} ranks on meta, and without shard nothing "
            "would bring the weights to them: use shard=FSDP1(), or placement='replicated'"
        )
    if shard is None:
        return
    if not torch.distributed.is_initialized():
        raise ConfigError(
            f"shard={type(shard).__name__}() needs a process group: start with torchrun and call "
            "torch.distributed.init_process_group() first, or pass shard=None for a single process"
        )
    if shard.mesh is not None and shard.mesh[0] * shard.mesh[1] != world_size:
        raise ConfigError(
            f"mesh={shard.mesh} needs {shard.mesh[0] * shard.mesh[1]} ranks (replicate x shard), but there are "
            f"{world_size}"
        )


def check_sharding(shard: FSDP1 | FSDP2 | None, placement: Placement, world_size: int, device: torch.device) -> None:
    """Each sharding's own conditions."""
    if placement == "sharded" and not isinstance(shard, FSDP2):
        wanted = "FSDP1 makes its shards itself" if shard is not None else "without shard there is none to keep"
        raise ConfigError(
            f"placement sharded keeps each rank's shard alone, but {wanted}: use shard=FSDP2(), or placement="
            f"{'rank0-cpu' if shard is not None else 'replicated'!r}"
        )
    if placement == "rank0-cpu" and isinstance(shard, FSDP2):
        raise ConfigError(
            "placement rank0-cpu waits for FSDP1 to broadcast rank 0's weights, which FSDP2 does not do: use placement="
            "'sharded', where no rank holds more than its shard, or shard=FSDP1()"
        )
    if isinstance(shard, FSDP1):
        _check_fsdp1(shard, placement, world_size, device)


def _check_fsdp1(shard: FSDP1, placement: Placement, world_size: int, device: torch.device) -> None:
    if placement == "rank0-cpu" and not shard.sync_module_states and world_size > 1:
        raise ConfigError(
            "placement rank0-cpu with sync_module_states=False: the ranks other than 0 would train on uninitialized "
            "memory, and FSDP says nothing. Leave sync_module_states=True, or use placement='replicated'"
        )
    if shard.cpu_offload and device.type == "cpu":
        raise ConfigError("cpu_offload moves parameters between an accelerator and the CPU; here there is only a CPU")


def check_precision(quant: Quant, shard: FSDP1 | FSDP2 | None, dtype: torch.dtype) -> None:
    """The packed storage against what FSDP flattens, casts and gathers."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype must be float32, bfloat16 or float16; got {dtype}")
    if shard is None:
        return
    storage = quant.storage_for(dtype)
    if not storage.is_floating_point:
        _check_integer_storage(storage, shard, dtype)
        return
    cast = shard.mixed_precision.param_dtype if shard.mixed_precision is not None else None
    if cast is None or cast == storage:
        return
    raise ConfigError(
        f"mixed_precision.param_dtype={cast} with quant_storage={storage}: {type(shard).__name__} would cast packed "
        "4-bit data as if it were numbers, and training would go on with garbage. Use param_dtype=None, or "
        f"quant_storage={cast}"
    )


def _check_integer_storage(storage: torch.dtype, shard: FSDP1 | FSDP2, dtype: torch.dtype) -> None:
    if isinstance(shard, FSDP1):
        raise ConfigError(
            f"quant_storage={storage} cannot be sharded by FSDP1, which flattens floating-point tensors only: use "
            f"quant_storage={dtype} (the same bytes under another name), or leave it None"
        )
    if Version(torch.__version__).release < FSDP2_SHARDS_INTEGERS:
        raise ConfigError(
            f"quant_storage={storage} cannot be sharded by FSDP2 of torch {torch.__version__}, which makes parameters "
            f"that require gradients of it: use torch {'.'.join(map(str, FSDP2_SHARDS_INTEGERS))} or later, or "
            f"quant_storage={dtype} (the same bytes under another name)"
        )


def check_ties(shard: FSDP1 | FSDP2 | None, tied: Mapping[str, tuple[str, ...]], world_size: int) -> None:
    """FSDP1 loses track of a tied parameter from the second forward on, where it keeps parameters and shards nothing.

    `tied` is first FQN -> aliases, of the whole model. One rank is as unsharded as strategy no-shard.
    """
    names = [name for name, aliases in tied.items() if aliases]
    if not isinstance(shard, FSDP1) or not shard.use_orig_params or not names:
        return
    if shard.strategy == "no-shard" or world_size == 1:
        raise ConfigError(
            f"{names[0]} is tied to {tied[names[0]][0]}, which FSDP1 cannot handle with use_orig_params=True while it "
            f"shards nothing ({'strategy no-shard' if world_size > 1 else 'one rank'}): its second forward fails. Use "
            "use_orig_params=False, or a sharding strategy on two ranks or more"
        )


def check_kept(
    shard: FSDP1 | FSDP2 | None, kept: Sequence[str], buffers: Mapping[str, torch.dtype], dtype: torch.dtype
) -> None:
    """What upstream keeps in another dtype than the model's against what FSDP casts.

    kept: FQNs of such parameters that FSDP gathers. buffers: FQN -> dtype of all buffers of floating point.
    """
    precision = shard.mixed_precision if shard is not None else None
    if precision is not None and precision.param_dtype is not None and kept:
        raise _would_cast("param_dtype", precision.param_dtype, kept, dtype)
    cast = getattr(precision, "buffer_dtype", None)
    others = [name for name, own in buffers.items() if own != cast] if cast is not None else []
    if others:
        raise _would_cast("buffer_dtype", cast, others, dtype)


def _would_cast(option: str, cast: torch.dtype | None, names: Sequence[str], dtype: torch.dtype) -> ConfigError:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return ConfigError(
        f"mixed_precision.{option}={cast} would cast what transformers keeps in another dtype: {shown} "
        f"({len(names)} in all). Use {option}=None: everything else is in {dtype} without it"
    )


def check_units(quant: Quant, lora: LoraConfig | None, shard: FSDP1 | FSDP2 | None, dtype: torch.dtype) -> None:
    """Whether a whole decoder block fits one flat parameter, where `units="block"` asks for that."""
    if not isinstance(shard, FSDP1) or shard.units != "block":
        return
    storage = quant.storage_for(dtype)
    if storage != dtype:
        raise ConfigError(
            f"units='block' with quant_storage={storage}: norms{' and adapters' if lora else ''} are {dtype}, and "
            "FSDP1 flattens one dtype only. Use units='auto', which wraps them on their own, or quant_storage=None"
        )
    if lora is not None and not shard.use_orig_params:
        raise ConfigError(
            "units='block' puts trainable adapters and frozen weights into one flat parameter, which FSDP1 refuses "
            "without use_orig_params: use use_orig_params=True, or units='auto', which wraps adapters on their own"
        )
