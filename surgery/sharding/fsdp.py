"""The base of both kinds of FSDP: a mesh, a cast that must spare packed weights, memory that is shared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from surgery.config import FSDP1, FSDP2
from surgery.errors import ConfigError
from surgery.model.fqn import PEFT_PREFIX, join
from surgery.model.pretrained import is_pretrained
from surgery.model.tree import Site
from surgery.quantizers.base import QuantFormat
from surgery.sharding.base import ShardStrategy, Unit
from surgery.sharding.partition import Grid

__all__ = ["Fsdp", "check_kept", "owners_of", "shared_parameters"]

#: Number of names that an error lists at most.
SHOWN = 4


class Fsdp(ShardStrategy):
    """The base of FSDP1 and FSDP2: parameters are divided over a mesh, and gathered for use."""

    options: FSDP1 | FSDP2 | None

    def __init__(self, options: Any, **setting: Any) -> None:
        super().__init__(options, **setting)
        self.cpu_offload = options is not None and options.cpu_offload

    @property
    def mesh_shape(self) -> tuple[int, int] | None:
        """`(replicate, shard)`, if it is chosen."""
        return None if self.options is None else self.options.mesh

    def check(self) -> None:
        """Refuse a mesh of another number of ranks than there are."""
        super().check()
        mesh = self.mesh_shape
        if mesh is not None and mesh[0] * mesh[1] != self.world_size:
            raise ConfigError(
                f"mesh={mesh} needs {mesh[0] * mesh[1]} ranks (replicate x shard), but there are {self.world_size}"
            )

    def check_format(self, quant: QuantFormat, *, adapted: bool) -> None:
        """Refuse a cast of packed weights."""
        precision = None if self.options is None else self.options.mixed_precision
        cast = None if precision is None else precision.param_dtype
        if cast is None or cast == quant.storage or not quant.storage.is_floating_point or not quant.needs_modules:
            return
        raise ConfigError(
            f"mixed_precision.param_dtype={cast} with quant_storage={quant.storage}: {self.label} would cast packed "
            f"data ({quant.label}) as if it were numbers, and training would go on with garbage. Use "
            f"param_dtype=None, or quant_storage={cast}"
        )

    def _check_kept(self, model: nn.Module, kept: Sequence[str], dtype: torch.dtype) -> None:
        if self.options is not None and self.options.casts_kept:
            return
        named = model.named_buffers() if is_pretrained(model) else ()
        buffers = {name: buffer.dtype for name, buffer in named if buffer.is_floating_point()}
        check_kept(None if self.options is None else self.options.mixed_precision, kept, buffers, dtype)

    def check_adapted(self, adapted: nn.Module, blocks: Sequence[Site], unsharded: set[nn.Parameter]) -> None:
        """Refuse parameters that are views of one memory.

        FSDP copies each parameter into shards, after which one that is a view of another would be trained apart.
        """
        first: dict[int, str] = {}
        for name, parameter in adapted.named_parameters():
            other = first.setdefault(parameter.untyped_storage()._cdata, name)
            if other != name:
                raise ConfigError(
                    f"lora: PEFT ties {name.removeprefix(PEFT_PREFIX)} to {other.removeprefix(PEFT_PREFIX)} by giving "
                    "both the same memory, which FSDP does not keep: use ensure_weight_tying=False, or no shard"
                )

    @cached_property
    def at_rest(self) -> Grid:
        """The mesh, all ranks in one row if none is chosen."""
        replicas, shards = self.mesh_shape or (1, self.world_size)
        return Grid(replicas=replicas, shards=shards)

    #: Whether blocks that are gathered in forward stay so until backward.
    keeps_gathered: bool = False

    def gathered_at_loss(self, units: Sequence[Unit]) -> int:
        """All units if blocks stay gathered, else those that the end of forward uses."""
        return self._gathered(units, self._at_end(units))

    def gathered_in_backward(self, units: Sequence[Unit]) -> int:
        """All units if blocks stay gathered, else the blocks that meet in backward, and the ends that are left."""
        blocks = sorted((unit.whole for unit in units if unit.kind == "block"), reverse=True)
        return self._gathered(units, self._in_block(blocks, units))

    def _gathered(self, units: Sequence[Unit], some: int) -> int:
        if self.at_rest.shards == 1:
            return 0
        return sum(unit.whole for unit in units) if self.keeps_gathered else some

    def _at_end(self, units: Sequence[Unit]) -> int:
        raise NotImplementedError

    def _in_block(self, blocks: Sequence[int], units: Sequence[Unit]) -> int:
        """Bytes unsharded in backward through the largest block. blocks: bytes of each, the largest first."""
        raise NotImplementedError


def check_kept(precision: Any, kept: Sequence[str], buffers: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
    """Refuse a `precision` that casts what upstream keeps in another dtype than `dtype`, the model's.

    precision: `MixedPrecision` or `MixedPrecisionPolicy`; None casts nothing. kept: FQNs of such parameters that FSDP
    gathers. buffers: FQN -> dtype of all buffers of floating point.
    """
    if precision is not None and precision.param_dtype is not None and kept:
        raise _would_cast("param_dtype", precision.param_dtype, kept, dtype)
    cast = getattr(precision, "buffer_dtype", None)
    others = [name for name, own in buffers.items() if own != cast] if cast is not None else []
    if others:
        raise _would_cast("buffer_dtype", cast, others, dtype)


def shared_parameters(
    owners: Mapping[nn.Parameter, Mapping[str, object]],
) -> Iterator[tuple[nn.Parameter, list[str], int]]:
    """Yield `(parameter, FQNs, number of groups)` of each parameter that would be sharded more than once.

    owners: as from `owners_of`.
    """
    for parameter, found in owners.items():
        count = len(set(found.values()))
        if count > 1:
            yield parameter, list(found), count


def owners_of(model: nn.Module, groups: Mapping[nn.Module, object]) -> dict[nn.Parameter, dict[str, object]]:
    """Parameter of `model` -> each of its FQNs, and the group there; None is the root's.

    groups: module -> its group, which what is inside of the module belongs to; all else is in the root's.
    """
    owners: dict[nn.Parameter, dict[str, object]] = defaultdict(dict)
    stack: list[tuple[str, nn.Module, object]] = [("", model, None)]
    while stack:
        prefix, module, outer = stack.pop()
        group = groups.get(module, outer)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter][join(prefix, name)] = group
        stack += [(join(prefix, name), child, group) for name, child in module._modules.items() if child is not None]
    return owners


def _would_cast(option: str, cast: torch.dtype | None, names: Sequence[str], dtype: torch.dtype) -> ConfigError:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return ConfigError(
        f"mixed_precision.{option}={cast} would cast what transformers keeps in another dtype: {shown} "
        f"({len(names)} in all). Use {option}=None: everything else is in {dtype} without it"
    )
