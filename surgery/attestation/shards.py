"""Where this rank's part of a packed weight is, however its model is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from surgery.errors import ConfigError
from surgery.quantizers.digest import Piece
from surgery.sharding.partition import chunk

__all__ = ["Shard", "shards_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """What this rank holds of a packed weight at rest.

    group: the ranks that hold the whole weight among them, each byte once; None where this rank holds all of it.
    """

    piece: Piece
    group: dist.ProcessGroup | None = None


def shards_of(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, Shard]:
    """The shard of the weight of each of `layers` of `model`; not to be called between a forward and its backward.

    Frees what FSDP2 still has gathered, which it gathers again when it needs it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    flat = dict(_flat_shards(model))
    return {layer: flat.get(layer) or _own_shard(layer) for layer in layers}


def _own_shard(layer: nn.Module) -> Shard:
    """Of a layer that has its weight as a parameter: whole, or sharded by FSDP2."""
    weight = layer._parameters["weight"]
    assert weight is not None
    if isinstance(weight, DTensor):
        return _sharded_along_rows(weight)
    return Shard(piece=Piece(data=weight.detach()))


def _sharded_along_rows(weight: DTensor) -> Shard:
    mesh, local = weight.device_mesh, weight.to_local()
    sharded = [number for number, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not sharded:
        return Shard(piece=Piece(data=local))
    if len(sharded) > 1 or not weight.placements[sharded[0]].is_shard(0):
        raise ConfigError(
            f"expected packed weights to be sharded along dimension 0, over one dimension of a mesh, found "
            f"{weight.placements}: shard the model with surgery.FSDP1 or surgery.FSDP2"
        )
    rows = chunk(range(weight.shape[0]), mesh.size(sharded[0]), mesh.get_local_rank(sharded[0]))
    start = rows.start * weight.shape[1:].numel() * weight.element_size()
    return Shard(piece=Piece(data=local, start=start), group=mesh.get_group(sharded[0]))


def _flat_shards(model: nn.Module) -> Iterator[tuple[nn.Module, Shard]]:
    """Of the layers whose weights are in flat parameters of FSDP1."""
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = unit._handle
        if handle is not None:
            yield from _unit_shards(handle)


def _unit_shards(handle: Any) -> Iterator[tuple[nn.Module, Shard]]:
    """By the module that holds a weight; `handle` keeps where in its flat parameter each parameter is."""
    flat = handle.flat_param
    # Before the first forward, and where nothing is sharded, there is one tensor only.
    local = getattr(flat, "_local_shard", flat.data) if handle.uses_sharded_strategy else flat.data
    group = handle.process_group if handle.uses_sharded_strategy else None
    for where, info in zip(flat._param_infos, flat._shard_param_infos, strict=True):
        if where.param_name != "weight":
            continue
        first, start, numel = (info.offset_in_shard, info.intra_param_start_idx, info.numel_in_shard)
        data = local[first : first + numel] if info.in_shard else local[:0]
        piece = Piece(data=data.detach(), start=start * flat.element_size() if info.in_shard else 0)
        yield where.module, Shard(piece=piece, group=group)
